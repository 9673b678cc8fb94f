"""Tests of the training loop: against a loop by hand, schedules, lack of memory, divergence."""

import math
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from deepfeat import FineTuneClassifier
from deepfeat._finetuning.training import make_schedule

RATES = {"learning_rate": 0.02, "backbone_learning_rate": 0.005}
OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "python": MemoryError(),
}


@pytest.fixture
def batch(images, to_16_pixels):
    """The images as a batch of tensors, and the labels as numbers."""
    pictures = [Image.fromarray(pixels) for pixels in images[0]]
    return torch.stack([to_16_pixels(picture) for picture in pictures]), torch.tensor([0, 1] * 4)


# Against a bare loop ----------------------------------------------------------------------------


def learn_by_hand(net, batch, epochs, recipe):
    """Train on one full batch per epoch, as in the manual of torch."""
    inputs, targets = batch
    weights = recipe.get("weights", torch.ones(len(targets)))
    groups = [
        {"params": list(net.fc.parameters()), "lr": RATES["learning_rate"]},
        {
            "params": [p for n, p in net.named_parameters() if not n.startswith("fc.")],
            "lr": RATES["backbone_learning_rate"],
        },
    ]
    decay = recipe.get("weight_decay", 1e-4)
    optimizer = (
        torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=decay)
        if recipe.get("optimizer") == "sgd"
        else torch.optim.AdamW(groups, weight_decay=decay)
    )
    schedule = None
    if recipe.get("schedule", "cosine") == "cosine":
        schedule = CosineAnnealingLR(optimizer, epochs)
    if recipe.get("schedule") == "one-cycle":
        schedule = OneCycleLR(
            optimizer, [*RATES.values()], total_steps=epochs, pct_start=0.3, cycle_momentum=False
        )
    losses, rates = [], []
    net.requires_grad_(True).train()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.3  # of a training of ten steps
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        smoothing = recipe.get("label_smoothing", 0.0)
        each = F.cross_entropy(net(inputs), targets, reduction="none", label_smoothing=smoothing)
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        if "max_grad_norm" in recipe:
            nn.utils.clip_grad_norm_(net.parameters(), recipe["max_grad_norm"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses, rates


WEIGHTS = [1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 1.0, 4.0]
RECIPES = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "constant": {"schedule": "constant"},
    "sgd, constant": {"schedule": "constant", "optimizer": "sgd"},
    "one-cycle": {"schedule": "one-cycle"},
    "sgd, one-cycle": {"schedule": "one-cycle", "optimizer": "sgd"},
    "weights": {"weights": torch.tensor(WEIGHTS)},
    "label smoothing": {"label_smoothing": 0.2},
    "clipping": {"max_grad_norm": 0.01, "optimizer": "sgd"},
    "weight decay": {"weight_decay": 0.3, "optimizer": "sgd"},
    "adamw, weight decay": {"weight_decay": 0.3},
    "all at once": {
        "optimizer": "sgd",
        "weights": torch.tensor(WEIGHTS),
        "label_smoothing": 0.1,
        "max_grad_norm": 0.2,
        "weight_decay": 0.1,
    },
}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "BatchNorm"])
@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_those_of_a_bare_loop(
    images, batch, name, norm, start_of, make_plain, make_classifier, state_of
):
    """Ten full batches: the weights, the losses and the learning rates are the same."""
    recipe = RECIPES[name]
    net = start_of(backbone=make_plain(norm=norm), unfreeze="all")
    if norm:  # one step has run, whose statistics are undone here
        net.load_state_dict(
            net.state_dict()
            | {k: v for k, v in make_plain(norm=True).state_dict().items() if "running" in k}
        )
    losses, rates = learn_by_hand(net, batch, 10, recipe)
    params = {key: value for key, value in recipe.items() if key != "weights"}
    classifier = make_classifier(
        make_plain(norm=norm), max_epochs=10, batch_size=8, augment=None, **RATES, **params
    )
    classifier.fit(*images, sample_weight=WEIGHTS if "weights" in recipe else None)
    assert_allclose([epoch["train_loss"] for epoch in classifier.history_], losses, rtol=1e-4)
    assert_allclose([epoch["learning_rate"] for epoch in classifier.history_], rates, rtol=1e-6)
    for (path, value), expected in zip(
        state_of(classifier).items(), net.state_dict().values(), strict=True
    ):
        # BatchNorm takes away a bias before it, whose gradient is nothing but rounding, by the size
        # of which AdamW divides.
        is_noise = norm and path.startswith("blocks") and path.endswith(".0.bias")
        if not is_noise and not path.endswith(("running_mean", "num_batches_tracked")):
            assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=path)


def test_the_loop_by_hand_tells_recipes_apart(batch, start_of, make_plain):
    """Their weights differ by much more than the tolerance of the law above."""
    trained = {}
    for name, recipe in RECIPES.items():
        net = start_of(backbone=make_plain(), unfreeze="all")
        learn_by_hand(net, batch, 10, recipe)
        trained[name] = torch.cat([value.detach().flatten() for value in net.parameters()])
    names = list(trained)
    for place, name in enumerate(names):
        for other in names[:place]:
            assert (trained[name] - trained[other]).abs().max() > 4e-4, (name, other)


def test_the_last_batch_may_be_smaller(images, make_classifier):
    """Losses are averaged over images: without training, the loss is that of all of them."""
    X, y = images
    params = {"learning_rate": 1e-30, "backbone_learning_rate": 1e-30, "optimizer": "sgd"}
    losses = [
        make_classifier(batch_size=size, max_epochs=1, weight_decay=0, augment=None, **params)
        .fit(X[:7], y[:7])
        .history_[0]["train_loss"]
        for size in (1, 2, 3, 7, 100)
    ]
    assert_allclose(losses, losses[0], rtol=1e-5)


# Schedules --------------------------------------------------------------------------------------


def rates_of(schedule, warmup, batches, epochs, rate=1.0):
    """Return the learning rate of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    classifier = FineTuneClassifier(schedule=schedule, warmup_epochs=warmup)
    config = classifier._make_config(None, epochs, torch.device("cpu"), 0, None)
    scheduler = make_schedule(config, optimizer, batches)
    rates = []
    for _ in range(batches * (epochs or 3)):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_falls_to_zero():
    """As in the paper, from step to step."""
    expected = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert_allclose(rates_of("cosine", 0, 4, 5), expected, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_warm_up_rises_in_even_steps(schedule):
    """Then the schedule begins at its peak."""
    expected = [(step + 1) / 5 for step in range(4)]
    expected += [(1 + math.cos(math.pi * step / 16)) / 2 if schedule == "cosine" else 1.0
                 for step in range(16)]  # fmt: skip
    assert_allclose(rates_of(schedule, 1, 4, 5), expected, atol=1e-12)
    assert_allclose(rates_of(schedule, 0.5, 8, 3)[:5], expected[:5], atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "one-cycle"])
def test_without_an_end_rates_are_constant(schedule):
    """As in `partial_fit`, which does not know how often it will be called."""
    assert rates_of(schedule, 2, 4, None) == [1.0] * 12


def test_one_cycle_rises_and_falls():
    """In the warm-up, or in 30 % of the steps."""
    rates = rates_of("one-cycle", 0, 10, 2)
    assert np.argmax(rates) == 5
    assert max(rates) == pytest.approx(1)
    assert (np.diff(rates)[:5] > 0).all()
    assert (np.diff(rates)[5:] < 0).all()
    assert np.argmax(rates_of("one-cycle", 1, 10, 2)) == 9


@pytest.mark.parametrize("schedule", ["cosine", "constant", "one-cycle"])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.5, 1, 2, 50])
@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
def test_every_schedule_goes_with_every_length(schedule, warmup, batches, epochs):
    """Rates are positive, never above the given rate, and reach it."""
    rates = rates_of(schedule, warmup, batches, epochs)
    assert len(rates) == batches * epochs
    assert min(rates) > 0
    assert max(rates) <= 1 + 1e-9
    reached = 1.0 if warmup * batches < batches * epochs - 1 else 0.3
    assert max(rates) >= reached * 0.95


# Lack of memory ---------------------------------------------------------------------------------


class Limited(nn.Module):
    """Run out of memory on more images than a limit; record how many came."""

    limit = 10**9
    error = OUT_OF_MEMORY["cuda"]
    backward = False

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        if not self.training:
            return self.net(images)
        SIZES.append(len(images))
        if len(images) > Limited.limit:
            if not Limited.backward:
                raise Limited.error
            return FailingBackward.apply(self.net(images))
        return self.net(images)


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Limited.error


SIZES: list[int] = []


@pytest.fixture(autouse=True)
def limited(monkeypatch):
    """Set the limit of `Limited` until the end of a test."""
    SIZES.clear()

    def limit(count, error=OUT_OF_MEMORY["cuda"], *, backward=False):
        monkeypatch.setattr(Limited, "limit", count)
        monkeypatch.setattr(Limited, "error", error)
        monkeypatch.setattr(Limited, "backward", backward)
        SIZES.clear()

    return limit


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_parts_learn_what_the_whole_batch_would(
    images, limited, kind, optimizer, make_classifier, make_plain, state_of
):
    """The step stays the same, with weights, smoothing and clipping; a warning explains it."""
    params = {"optimizer": optimizer, "batch_size": 8, "label_smoothing": 0.1, "augment": None}
    params |= {"max_epochs": 3, "max_grad_norm": 0.1}
    whole = make_classifier(Limited(make_plain()), **params).fit(*images, sample_weight=WEIGHTS)
    limited(3, OUT_OF_MEMORY[kind])
    parts = make_classifier(Limited(make_plain()), **params)
    with pytest.warns(RuntimeWarning, match="cpu ran out of memory") as caught:
        parts.fit(*images, sample_weight=WEIGHTS)
    assert [str(warning.message) for warning in caught] == [
        f"cpu ran out of memory; continuing with parts of {size} images, whose gradients add up "
        "to those of a batch of 8."
        for size in (4, 2)
    ]
    assert SIZES == [8, 4] + [2] * 12
    for (path, value), expected in zip(
        state_of(parts).items(), state_of(whole).values(), strict=True
    ):
        assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=path)
    losses = [[epoch["train_loss"] for epoch in one.history_] for one in (parts, whole)]
    assert_allclose(*losses, rtol=1e-5)


def test_gradients_of_a_pass_that_failed_half_way_are_dropped(
    images, limited, make_classifier, make_plain, state_of
):
    """Memory may run out in the backward pass of a later part."""
    params = {"optimizer": "sgd", "batch_size": 8, "augment": None}
    whole = make_classifier(Limited(make_plain()), **params).fit(*images)
    limited(4, backward=True)
    with pytest.warns(RuntimeWarning, match="parts of 4 images"):
        parts = make_classifier(Limited(make_plain()), **params).fit(*images)
    for value, expected in zip(state_of(parts).values(), state_of(whole).values(), strict=True):
        assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_a_single_image_that_does_not_fit_is_an_error(images, limited, make_classifier, make_plain):
    """There is nothing left to halve."""
    limited(0)
    with (
        pytest.warns(RuntimeWarning, match="ran out of memory"),
        pytest.raises(
            MemoryError,
            match=r"cpu does not have enough memory to train on a .*: CUDA out",
        ),
    ):
        make_classifier(Limited(make_plain()), augment=None).fit(*images)
    assert SIZES == [4, 2, 1]


def test_other_errors_pass_through(images, limited, make_classifier, make_plain):
    """A fault in the network is not hidden behind smaller and smaller batches."""
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    limited(0, error)
    with pytest.raises(RuntimeError) as caught:
        make_classifier(Limited(make_plain()), augment=None).fit(*images)
    assert caught.value is error
    assert SIZES == [4]


# Small batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("name", ["own", "squeezenet1_1", "resnet18"])
def test_a_batch_may_have_one_image(name, batch_size, make_images, make_plain, make_classifier):
    """With nine images the last batch often has one: a trained BatchNorm accepts it."""
    side = 16 if name == "own" else 32
    X, y = make_images(9, side)
    if name != "own" and batch_size not in (1, 8):
        X, y = X[: batch_size + 1], y[: batch_size + 1]
    net = make_plain(norm=True) if name == "own" else name
    classifier = make_classifier(net, unfreeze="all", batch_size=batch_size, max_epochs=1)
    assert np.isfinite(classifier.fit(X, y).predict_proba(X)).all()


def test_a_batch_of_one_image_leaves_statistics_as_they_are(
    make_images, make_plain, make_classifier, state_of
):
    """It is normalised with running statistics: a single image may not have any variance."""
    X, y = make_images(5)
    net = make_plain(norm=True)
    classifier = make_classifier(net, batch_size=4, max_epochs=1).fit(X, y)
    assert state_of(classifier)["blocks.0.1.num_batches_tracked"] == 1
    alone = make_classifier(net, batch_size=1, max_epochs=1).fit(X, y)
    for name, value in net.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(state_of(alone)[name], value, rtol=0, atol=0)


def test_one_image_a_class_is_enough(make_images, make_classifier):
    """Without early stopping, which needs some to hold out."""
    X, y = make_images(2)
    classifier = make_classifier(max_epochs=30, **RATES).fit(X, y)
    assert classifier.score(X, y) == 1


# Randomness -------------------------------------------------------------------------------------


def without_times(history):
    left_out = ("seconds", "images_per_second")
    return [{k: v for k, v in epoch.items() if k not in left_out} for epoch in history]


@pytest.mark.parametrize("augment", [None, "flip", "crop"])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_one_seed_gives_one_network(
    images, augment, num_workers, make_classifier, make_plain, assert_same_state, state_of
):
    """To the bit, with dropout, for any number of threads and any state of global generators."""
    params = {"augment": augment, "max_epochs": 3, "early_stopping": True}
    params |= {"validation_fraction": 0.25}
    first = make_classifier(make_plain(dropout=0.5, norm=True), **params).fit(*images)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    params["num_workers"] = num_workers
    second = make_classifier(make_plain(dropout=0.5, norm=True), **params).fit(*images)
    assert_same_state(state_of(first), state_of(second))
    assert without_times(first.history_) == without_times(second.history_)


@pytest.mark.parametrize("seed", [1, np.int64(2), 2**31 + 5])
def test_another_seed_gives_another_network(images, seed, make_classifier, state_of):
    """The head, the order and the dropout all depend on it."""
    first, second = (make_classifier(random_state=seed).fit(*images) for seed in (0, seed))
    assert not torch.equal(state_of(first)["fc.weight"], state_of(second)["fc.weight"])


def test_a_random_state_gives_each_fit_another_seed(
    images, make_classifier, assert_same_state, state_of
):
    """The same ones in each run of a program."""
    fits = []
    for _ in range(2):
        state = np.random.RandomState(0)
        fits.append([make_classifier(random_state=state).fit(*images) for _ in range(2)])
    (first, second), (again, _) = fits
    assert not torch.equal(state_of(first)["fc.weight"], state_of(second)["fc.weight"])
    assert_same_state(state_of(first), state_of(again))


def test_without_a_seed_two_fits_differ(images, make_classifier, state_of):
    """As in scikit-learn."""
    first, second = (make_classifier(random_state=None).fit(*images) for _ in range(2))
    assert not torch.equal(state_of(first)["fc.weight"], state_of(second)["fc.weight"])


def test_generators_of_others_are_left_alone(images, monkeypatch, make_plain, make_classifier):
    """Those of torch, of NumPy, and of devices that are not used."""
    net = make_plain(dropout=0.5)
    for name in ("manual_seed_all", "manual_seed"):
        monkeypatch.setattr(torch.cuda, name, lambda seed: pytest.fail("CUDA was seeded"))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    classifier = make_classifier(net, random_state=None).fit(*images)
    classifier.partial_fit(*images)
    classifier.predict(images[0])
    torch.testing.assert_close(torch.get_rng_state(), before[0], rtol=0, atol=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_the_order_changes_from_epoch_to_epoch(images, make_classifier):
    """And each epoch sees every image once."""
    seen = []

    def note(image):
        seen.append(np.asarray(image).tobytes())
        return image

    make_classifier(augment=note, max_epochs=3, batch_size=3).fit(*images)
    epochs = [seen[:8], seen[8:16], seen[16:]]
    assert {frozenset(epoch) for epoch in epochs} == {frozenset(x.tobytes() for x in images[0])}
    assert len({tuple(epoch) for epoch in epochs}) == 3


# Divergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_no_number_ends_the_training(images, optimizer, make_classifier):
    """The error says what to lower."""
    words = r"The (loss|weights) became .* in epoch [12]: lower learning_rate \(1e\+36\) or backb"
    classifier = make_classifier(
        learning_rate=1e36, optimizer=optimizer, max_epochs=5, schedule="constant"
    )
    with pytest.raises(ValueError, match=words) as caught:
        classifier.fit(*images)
    assert "max_grad_norm=1.0" in str(caught.value)
    assert "bfloat16" not in str(caught.value)
    assert not hasattr(classifier, "module_")


def test_a_training_that_fails_leaves_what_was_learned_before(
    images, make_classifier, state_of, assert_same_state
):
    """A warm start trains a copy."""
    X, y = images
    classifier = make_classifier(warm_start=True).fit(X, y)
    state = {name: value.clone() for name, value in state_of(classifier).items()}
    history, logits = list(classifier.history_), classifier.decision_function(X)
    classifier.set_params(learning_rate=1e36, schedule="constant", max_epochs=5)
    with pytest.raises(ValueError, match="The weights became"):
        classifier.fit(X, y)
    assert_same_state(state_of(classifier), state)
    assert classifier.history_ == history
    np.testing.assert_array_equal(classifier.decision_function(X), logits)


# Precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_lower_precision_learns_as_well(
    images, precision, max_grad_norm, make_classifier, make_plain
):
    """Weights stay float32; the loss is close to that of float32."""
    params = {"max_epochs": 4, "max_grad_norm": max_grad_norm, "augment": None, **RATES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step of the schedule before one of the optimizer warns
        low = make_classifier(make_plain(norm=True), precision=precision, **params).fit(*images)
    high = make_classifier(make_plain(norm=True), **params).fit(*images)
    assert {value.dtype for value in low.module_.parameters()} == {torch.float32}
    losses = [[epoch["train_loss"] for epoch in one.history_] for one in (low, high)]
    assert_allclose(*losses, rtol=0.1)
    assert_allclose(low.predict_proba(images[0]), high.predict_proba(images[0]), atol=0.1)
    assert losses[0] != losses[1]


def test_gradients_of_float16_are_clipped_without_their_scale(images, make_plain, make_classifier):
    """Clipped with it, SGD would hardly move."""
    params = {"optimizer": "sgd", "max_grad_norm": 1.0, "max_epochs": 6, "augment": None}
    params |= {"learning_rate": 0.1, "backbone_learning_rate": 0.1, "schedule": "constant"}
    net = make_plain(norm=True)
    fits = [
        make_classifier(net, precision=name, **params).fit(*images)
        for name in ("float32", "float16")
    ]
    falls = [fit.history_[0]["train_loss"] - fit.history_[-1]["train_loss"] for fit in fits]
    assert falls[0] > 0.001
    assert_allclose(falls[1], falls[0], rtol=0.2)


def test_the_error_of_float16_names_bfloat16(images, make_classifier):
    """Which has the range of float32."""
    classifier = make_classifier(learning_rate=1e36, precision="float16", max_epochs=20)
    with pytest.raises(ValueError, match="or precision='bfloat16'"):
        classifier.set_params(schedule="constant").fit(*images)


def test_steps_that_float16_leaves_out_are_none_of_the_schedule(images, make_classifier):
    """The scale starts too high for these losses: learning rates wait for it."""
    weights = np.ones(8)
    classifier = make_classifier(precision="float16", batch_size=8, max_epochs=3)
    rates = [e["learning_rate"] for e in classifier.fit(*images, weights).history_]
    assert rates == sorted(rates, reverse=True)


def test_a_transformer_learns_too(images, make_vit, make_classifier):
    """With dropout, and a head that gets the class token."""
    vit = make_vit(dropout=0.1)
    classifier = make_classifier(vit, max_epochs=30, batch_size=8, augment=None, **RATES)
    losses = [epoch["train_loss"] for epoch in classifier.fit(*images).history_]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_diverges_in_the_last_step_is_an_error_too(images, optimizer, make_classifier):
    """No loss comes after it; with weights of NaN, every prediction would be "dark"."""
    X, y = images
    rates = {"learning_rate": 1e36, "backbone_learning_rate": 1e36}
    classifier = make_classifier(
        max_epochs=1, batch_size=8, optimizer=optimizer, schedule="constant", **rates
    )
    with pytest.raises(ValueError, match=r"became .* in epoch 1: lower learning_rate"):
        classifier.fit(X, y, X_val=X, y_val=y)
    assert not hasattr(classifier, "module_")
