from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import TensorDataset

from lightning_unlearn.filters import find_filters
from lightning_unlearn.methods import FineTuning, MaskPrune
from lightning_unlearn.methods.mask_prune import _sent_to_target
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")
CUTS = ("soft", "mixed", "hard")
NORM_OF = {
    "vgg": {"0": "1", "4": "5"},
    "plain": {},
    "preact": {"1.conv1": "1.norm2", "2.conv1": "2.norm2", "0": "1.norm1"},
}


def learn(**options):
    """Few, large steps on all images, without limits: what is learned is what is cut."""
    defaults = {"steps": 6, "learning_rate": 0.2, "batch_size": 1000, "sparsity": 0.0, "accuracy_drop": 1.0}
    return MaskPrune(**{**defaults, "augment": False, "clean_weight": 2.0, "temperature": 1.0, **options})


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def new(name="vgg", **options):
        net = make_net(name, seed=1)
        with torch.no_grad():  # or untrained nets would answer much the same to everything
            net[-1].weight.mul_(20)
        task = make_task(net, make_clean(8), PatchTrigger(size=5, target=1), **options)
        task.original = copy.deepcopy(task.model)
        return task

    return new


def factors(task, original=None):
    """By how much each channel was scaled, all of its tensors alike: {(layer, filter): factor}."""
    found = {}
    originals = find_filters(original or task.original, task.scoring.clean[:1])
    for now, before in zip(task.mask.layers, originals, strict=True):
        pairs = [(n.tensor, b.tensor) for n, b in zip(now.gates, before.gates, strict=True)]
        if not pairs:
            pairs = [(now.weight, before.weight)]
            pairs += [(n.tensor, b.tensor) for n, b in zip(now.bias, before.bias, strict=True)]
        for index in range(now.channels):
            one = torch.cat([tensor.detach()[index].flatten() for tensor, _ in pairs])
            other = torch.cat([tensor.detach()[index].flatten() for _, tensor in pairs])
            factor = (one @ other / (other @ other)).item()
            assert torch.allclose(one, factor * other, rtol=1e-4, atol=1e-7), (now.name, index)
            found[now.name, index] = factor
    return found


def everything_else(task):
    """State that no method may touch: what neither belongs to a filter nor to the norm that consumes it."""
    filters = {
        id(tensor)
        for layer in task.mask.layers
        for tensor in (layer.weight, *(c.tensor for c in (*layer.bias, *layer.norms)))
    }
    state = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    return [name for name, tensor in state.items() if id(tensor) not in filters]


def assert_pruned_is_zero(task):
    for layer in task.mask.layers:
        for index in task.mask.to_dict().get(layer.name, []):
            for tensor in (layer.weight, *(c.tensor for c in (*layer.bias, *layer.norms))):
                assert tensor[index].count_nonzero() == 0


# What is learned


def scaled_by_hand(net, layer, index, norm_of, factor):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.get_submodule(norm_of.get(layer, layer)).parameters():
            parameter[index] *= factor
    return net


@pytest.mark.parametrize(
    ("teacher", "temperature", "clean_weight"),
    [("victim", 1.0, 1.0), ("victim", 2.0, 4.0), ("victim", 0.5, 0.0), ("labels", 1.0, 1.0), ("labels", 3.0, 4.0)],
)
@pytest.mark.parametrize("name", NORM_OF)
def test_the_first_step_follows_the_gradient(new_task, name, teacher, temperature, clean_weight):
    # Adam's first step is as large as the learning rate, whatever the gradient: above 1, masks go to 0, or stay at 1.
    task = new_task(name)
    net, images = copy.deepcopy(task.model).double(), task.scoring.clean.double()
    triggered = task.scoring.triggered.double()
    tau = temperature if teacher == "victim" else 1.0  # there is nothing to soften in a label
    with torch.no_grad():
        answers = (net(images) / tau).softmax(1) if teacher == "victim" else F.one_hot(task.scoring.labels, 4).double()
    little, slopes = 1e-6, {}

    def loss(layer, index, factor):
        scaled = scaled_by_hand(net, layer, index, NORM_OF[name], factor)
        with torch.no_grad():
            clean, backdoor = (F.cross_entropy(scaled(x) / tau, answers).item() for x in (images, triggered))
        return clean_weight / 2 * clean + backdoor  # half, since nothing is augmented

    for number in range(task.mask.total):
        pick = task.mask.locate(number)
        slopes[pick] = (loss(*pick, 1 + little) - loss(*pick, 1 - little)) / (2 * little)
    options = {"teacher": teacher, "temperature": temperature, "clean_weight": clean_weight}
    list(learn(cut="soft", steps=1, learning_rate=1.5, **options).repair(task))
    clear = {pick for pick, slope in slopes.items() if abs(slope) > 1e-5}
    assert len(clear) > task.mask.total / 2
    wanted = {pick for pick in clear if slopes[pick] > 0}
    assert 0 < len(wanted) < len(clear)
    assert set(task.mask.pruned) & clear == wanted


@pytest.mark.parametrize("learning_rate", [0.05, 5.0])
@pytest.mark.parametrize("teacher", ["victim", "labels"])
@pytest.mark.parametrize("name", NETS)
def test_masks_stay_between_0_and_1(new_task, name, teacher, learning_rate):
    task = new_task(name)
    list(learn(cut="soft", teacher=teacher, learning_rate=learning_rate, sparsity=0.0).repair(task))
    scales = factors(task)
    assert all(0 <= factor <= 1 for factor in scales.values())
    assert min(scales.values()) < 1


def test_sparsity_is_the_price_of_turning_down(new_task):
    lowered = []
    for sparsity in (0.0, 0.01, 10.0):
        task = new_task()
        list(learn(cut="soft", sparsity=sparsity).repair(task))
        lowered.append(sum(1 - factor for factor in factors(task).values()))
    assert lowered[0] > lowered[1] > lowered[2] == 0


def test_nothing_draws_channels_back_while_the_trigger_works(hand_victim, make_task):
    # In the first step every triggered image is still answered as the attacker wants: no price, however high.
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    others = task.scoring.labels != task.scoring.targets
    task.scoring, task.answers = task.scoring[others], task.answers[others]
    original = copy.deepcopy(task.model)
    list(learn(cut="soft", sparsity=1e6, steps=1).repair(task))
    assert factors(task, original)["0", 3] == pytest.approx(0.8)


def test_images_are_flipped_and_shifted_before_the_trigger(new_task):
    class Spy(PatchTrigger):
        seen = ()

        def stamp(self, pixels):
            self.seen = (*self.seen, pixels.clone())
            return super().stamp(pixels)

    task = new_task()
    task.trigger = Spy(size=5, target=1)
    list(learn(cut="soft", steps=2).repair(task))
    assert not task.trigger.seen
    list(learn(cut="soft", steps=2, augment=True).repair(task))
    assert len(task.trigger.seen) == 4  # the scoring part, the validation part, and two steps
    assert not torch.equal(*task.trigger.seen[2:])
    list(learn(cut="soft", steps=2, augment=True, teacher="labels").repair(task))
    assert len(task.trigger.seen) == 4  # a mirrored image may not be what its label says
    known = {image.sum().item() for image in task.scoring.clean}
    assert not {image.sum().item() for image in task.trigger.seen[2]} <= known  # shifted, not only turned


def test_images_are_left_as_they_are_where_the_victim_does_not_bear_it(hand_victim, make_task):
    # Turned by 90 degrees, its classes are columns of light, which a mirror exchanges.
    images, labels = (part.clone() for part in hand_victim.clean.tensors)
    with torch.no_grad():
        hand_victim.net[0].weight.copy_(hand_victim.net[0].weight.transpose(2, 3).clone())
    clean = TensorDataset(images.transpose(2, 3).contiguous(), labels)
    task = make_task(hand_victim.net, clean, hand_victim.trigger)
    assert task.measure().acc == 1
    state = copy.deepcopy(task.model.state_dict())
    found = []
    for augment in (True, False):
        task.model.load_state_dict(state)
        list(learn(cut="soft", steps=3, augment=augment, accuracy_drop=0.1).repair(task))
        found.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
        task.mask.undo(task.mask.steps)
    assert torch.equal(*found)


def test_the_victims_answers_need_no_labels(new_task):
    states = {"victim": [], "labels": []}
    for teacher, found in states.items():
        for shift in (0, 1):
            task = new_task()
            task.scoring = dataclasses.replace(task.scoring, labels=(task.scoring.labels + shift) % 4)
            list(learn(cut="soft", teacher=teacher).repair(task))
            found.append(torch.cat([p.flatten() for p in task.model.parameters()]))
    assert torch.equal(*states["victim"])
    assert not torch.equal(*states["labels"])


def test_the_masked_victim_answers_triggered_images_as_clean_ones(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    with torch.no_grad():
        answers = task.model(task.scoring.clean).softmax(1)
    list(MaskPrune(cut="soft", steps=60, finetune=False).repair(task))
    with torch.no_grad():
        now = [task.model(images).softmax(1) for images in (task.scoring.clean, task.scoring.triggered)]
    assert all((probabilities - answers).abs().max() < 0.05 for probabilities in now)


def test_the_price_of_the_target_by_hand():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0], [5.0, 0.0, 1.0]]).log_softmax(1)
    probabilities = logits.exp()
    # The first and the third are sent to classes 1 and 0; the second belongs there, as the teacher says.
    price = _sent_to_target(logits, torch.tensor([1, 0, 0]), torch.tensor([2, 0, 1]))
    assert price == pytest.approx(-((1 - probabilities[0, 1]).log() + (1 - probabilities[2, 0]).log()).item() / 3)


def test_the_price_of_the_target_rises_from_nothing(new_task, monkeypatch):
    seen, real = [], MaskPrune._disagreement

    def spy(self, task, pairs, wanted, clean_weight, target_weight):
        seen.append((clean_weight, target_weight))
        return real(self, task, pairs, wanted, clean_weight, target_weight)

    monkeypatch.setattr(MaskPrune, "_disagreement", spy)
    list(learn(steps=4, target_weight=8.0).repair(new_task()))
    assert seen == [(1, 0), (1, 2), (1, 4), (1, 6)]


def test_a_trigger_without_a_clean_answer_is_still_not_sent_to_the_target(new_task):
    # The images that carry it have nothing to do with what they replace, so that what they should be is a coin's toss.
    def sent(target_weight):
        task = new_task()
        foreign = torch.rand(task.scoring.clean.shape, generator=torch.Generator().manual_seed(5))
        task.scoring = dataclasses.replace(task.scoring, triggered=foreign)
        others = task.scoring.labels != 1
        list(learn(cut="soft", steps=20, target_weight=target_weight).repair(task))
        with torch.no_grad():
            return task.model(foreign).softmax(1)[others, 1].mean().item()

    assert sent(8.0) < 0.6 * sent(0.0)


# What is cut


@pytest.mark.parametrize("name", NETS)
def test_soft(new_task, name):
    task = new_task(name)
    rounds = list(learn(cut="soft").repair(task))
    scales = factors(task)
    assert set(task.mask.pruned) == {pick for pick, factor in scales.items() if factor == 0}
    assert any(0 < factor < 1 for factor in scales.values())
    assert rounds[-1].pruned == task.mask.pruned
    assert_pruned_is_zero(task)


@pytest.mark.parametrize("slack", [0.0, 0.05, 1e9])
@pytest.mark.parametrize("name", ["preact", "plain"])
def test_mixed(new_task, name, slack):
    # 1e9: the loss may rise as it likes, so that all that is half off goes.
    soft, mixed = new_task(name), new_task(name)
    list(learn(cut="soft").repair(soft))
    list(learn(cut="mixed", slack=slack).repair(mixed))
    before, after = factors(soft), factors(mixed)
    assert_pruned_is_zero(mixed)
    pruned, kept = set(mixed.mask.pruned), set(after) - set(mixed.mask.pruned)
    assert set(soft.mask.pruned) <= pruned
    assert all(after[pick] == pytest.approx(before[pick]) for pick in kept)
    assert max((before[pick] for pick in pruned), default=0.0) <= min(before[pick] for pick in kept) + 1e-6
    losses = [now.loss + now.unlearning_loss for now in (soft.measure(), mixed.measure())]
    assert losses[1] <= losses[0] + slack + 1e-6
    if slack == 1e9:
        assert pruned == {pick for pick, factor in before.items() if factor < 0.5}


@pytest.mark.parametrize("name", NETS)
def test_hard(new_task, name):
    soft, hard = new_task(name), new_task(name)
    list(learn(cut="soft").repair(soft))
    rounds = list(learn(cut="hard").repair(hard))
    before, after = factors(soft), factors(hard)
    pruned = set(hard.mask.pruned)
    assert_pruned_is_zero(hard)
    assert rounds[-1].pruned == hard.mask.pruned
    # The lowest masks go, and what stays is bit for bit as it was.
    assert max((before[pick] for pick in pruned), default=0) <= min(before[pick] for pick in set(before) - pruned)
    hard.mask.undo(hard.mask.steps)
    state = hard.original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in hard.model.state_dict().items())
    assert after.keys() == before.keys()


@pytest.mark.parametrize("name", NETS)
def test_hard_leaves_the_lowest_loss(new_task, name):
    task = new_task(name)
    start = task.measure()
    list(learn(cut="hard").repair(task))
    now = task.measure()
    assert now.loss + now.unlearning_loss <= start.loss + start.unlearning_loss


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NETS)
def test_nothing_else_is_touched(new_task, name, cut):
    task = new_task(name)
    parameters = list(task.model.parameters())
    original = {**dict(task.original.named_parameters()), **dict(task.original.named_buffers())}
    names = everything_else(task)
    list(learn(cut=cut).repair(task))
    assert names
    state = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    assert all(torch.equal(state[key], original[key]) for key in names)
    assert all(torch.equal(tensor, original[key]) for key, tensor in task.model.named_buffers())
    assert all(now is before for now, before in zip(task.model.parameters(), parameters, strict=True))
    assert not any(module.training for module in task.model.modules())


@pytest.mark.parametrize("cut", CUTS)
def test_nothing_turned_down_is_nothing_done(new_task, cut):
    task = new_task()
    list(learn(cut=cut, sparsity=10.0).repair(task))
    assert task.mask.pruned == ()
    state = task.original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("cut", CUTS)
def test_a_known_backdoor_goes(hand_victim, make_task, cut):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    list(MaskPrune(cut=cut, finetune=False).repair(task))
    now = task.measure()
    assert (now.acc, now.asr, now.ra) == (1.0, 0.0, 1.0)
    weights = task.model[0].weight.detach().flatten(1).norm(dim=1)
    assert weights[3] <= 0.25  # it was 1
    assert weights[:3].min() >= 0.25  # they were 0.5
    if cut == "hard":
        assert task.mask.to_dict() == {"0": [3]}


# Accuracy


@pytest.mark.parametrize("accuracy_drop", [0.001, 0.1, 0.4])
@pytest.mark.parametrize("cut", ["soft", "mixed"])
def test_accuracy_does_not_fall_by_more_than_alpha(hand_victim, make_task, cut, accuracy_drop):
    # A teacher who says 0 to everything turns the filters of classes 1 and 2 down, until only class 0 is right.
    original, left = copy.deepcopy(hand_victim.net), []
    for alpha in (accuracy_drop, 1.0):
        task = make_task(copy.deepcopy(original), hand_victim.clean, hand_victim.trigger)
        task.answers = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(task.scoring), -1)
        method = learn(cut=cut, accuracy_drop=alpha, steps=20, learning_rate=0.1, slack=10.0, validate_every=1)
        list(method.repair(task))
        left.append(task.measure().acc)
        learned = factors(task, original)
        assert learned["0", 1] < 1
    assert 1 >= left[0] >= 1 - accuracy_drop - 1e-6
    assert left[1] == pytest.approx(1 / 3)  # without a limit


def test_masks_that_cost_too_much_are_drawn_back_no_further_than_needed(hand_victim, make_task):
    def task(scales=(1, 1, 1, 1)):
        net = copy.deepcopy(hand_victim.net)
        with torch.no_grad():
            for parameter in net[0].parameters():
                parameter.mul_(torch.tensor(scales).view(-1, *[1] * (parameter.ndim - 1)))
        return make_task(net, hand_victim.clean, hand_victim.trigger)

    def learned(alpha):
        of = task()
        of.answers = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(of.scoring), -1)
        list(learn(cut="soft", accuracy_drop=alpha, steps=1, learning_rate=1.0).repair(of))
        found = list(factors(of, hand_victim.net).values())
        assert of.measure().acc == task(found).measure().acc
        return torch.tensor(found), of.measure().acc

    far, acc = learned(1.0)
    assert acc < 0.9
    back, acc = learned(0.1)
    assert acc >= 0.9
    share = ((1 - back) / (1 - far))[far < 1]
    assert torch.allclose(share, share[0].mul(10).round() / 10)  # all by as many tenths
    assert 0.1 < share[0] < 0.95
    assert task((1 - (share[0] + 0.1) * (1 - far)).tolist()).measure().acc < 0.9


@pytest.mark.parametrize("accuracy_drop", [0.001, 0.1, 0.4])
def test_pruning_costs_no_more_than_alpha_either(hand_victim, make_task, accuracy_drop):
    # The masks alone cost nothing, but any amount of loss may be paid for pruning.
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    method = learn(cut="mixed", accuracy_drop=accuracy_drop, sparsity=0.0, steps=3, learning_rate=0.05, slack=1e9)
    task.answers = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(task.scoring), -1)
    list(method.repair(task))
    assert task.measure().acc >= 1 - accuracy_drop - 1e-6


# Rounds


@pytest.mark.parametrize(("steps", "validate_every", "learned"), [(6, 2, 3), (7, 3, 3), (2, 10, 1), (1, 1, 1)])
def test_rounds(new_task, steps, validate_every, learned):
    task = new_task()
    rounds = list(learn(steps=steps, validate_every=validate_every, batch_size=10).repair(task))
    assert [done.stage for done in rounds] == ["learn"] * learned + ["prune"]
    assert [done.round for done in rounds] == list(range(1, learned + 2))
    assert all(done.pruned == () for done in rounds[:-1])
    now = task.validate()
    assert (rounds[-1].val_acc, rounds[-1].val_loss) == (now.acc, now.loss)


def test_learned_rounds_show_the_masked_model(new_task):
    soft, task = new_task(), new_task()
    rounds = list(learn(cut="soft", steps=4, validate_every=4).repair(soft))
    assert rounds[0].val_loss == pytest.approx(rounds[1].val_loss, rel=1e-5)
    assert rounds[0].val_unlearning_loss == pytest.approx(rounds[1].val_unlearning_loss, rel=1e-5)
    assert rounds[0].val_loss != pytest.approx(task.validate().loss, rel=1e-3)


def test_finetuning_comes_last(new_task):
    task = new_task()
    own = FineTuning(triggered=True, max_epochs=2, accuracy_drop=1.0)
    stages = [done.stage for done in learn(steps=4, validate_every=2, finetune=own).repair(task)]
    assert stages == ["learn", "learn", "prune", "finetune", "finetune"]
    assert_pruned_is_zero(task)
    assert MaskPrune(finetune=own).finetune is own
    assert MaskPrune(finetune=False).finetune is False
    default = MaskPrune(finetune=True, accuracy_drop=0.3).finetune
    assert (default.triggered, default.accuracy_drop) == (True, 0.3)


# Seeds


@pytest.mark.parametrize("cut", CUTS)
def test_the_seed_decides(new_task, cut):
    states = []
    for seed in (4, 4, 5):
        task = new_task(seed=seed)
        list(learn(cut=cut, batch_size=5, slack=0.0, finetune=False).repair(task))
        states.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    assert torch.equal(states[0], states[1])
    if cut != "hard":  # the order of masks may well be the same
        assert not torch.equal(states[0], states[2])


# Leaving early


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("name", ["vgg", "plain", "preact"])
def test_closing_early_displaces_nothing(new_task, name, rounds):
    task = new_task(name)
    parameters, buffers = list(task.model.parameters()), list(task.model.buffers())
    search = learn(steps=6, validate_every=2).repair(task)
    for _ in range(rounds):
        assert next(search).stage == "learn"
        # Between rounds too.
        assert all(now is before for now, before in zip(task.model.parameters(), parameters, strict=True))
    search.close()
    assert all(now is before for now, before in zip(task.model.parameters(), parameters, strict=True))
    assert all(now is before for now, before in zip(task.model.buffers(), buffers, strict=True))
    # Learning writes nothing.
    state = task.original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("name", ["vgg", "plain"])
def test_an_exception_anywhere_displaces_nothing(new_task, name):
    calls = limit = 0

    def forward(images):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return task.model(images)

    finished = False
    while not finished:
        task, calls = new_task(name), 0
        parameters = list(task.model.parameters())
        task.forward = forward
        try:
            list(learn(cut="soft", steps=2, validate_every=2).repair(task))
            finished = True
        except KeyboardInterrupt:
            limit += 1
        assert all(now is before for now, before in zip(task.model.parameters(), parameters, strict=True))
        assert all(isinstance(tensor, torch.nn.Parameter) for tensor in parameters)
    assert limit >= 5


# Errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher": "me"}, "^teacher: expected 'victim' or 'labels', but got 'me'"),
        ({"cut": "deep"}, "^cut: expected 'soft', 'mixed' or 'hard', but got 'deep'"),
        ({"clean_weight": -0.1}, "clean_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"steps": 0}, r"^steps: .* but got 0"),
        ({"learning_rate": 0.0}, r"^learning_rate: expected a value in \(0, inf\], but got 0.0"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"sparsity": -1e-3}, r"^sparsity: .* but got -0.001"),
        ({"slack": -0.1}, r"^slack: .* but got -0.1"),
        ({"validate_every": 0}, r"^validate_every: .* but got 0"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: expected a value in \(0, 1\], but got 0.0"),
        ({"accuracy_drop": 1.5}, r"^accuracy_drop: .* but got 1.5"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        MaskPrune(**options)
