"""Every training step, inference, refinement and descent on a device that is not the CPU, without one being there.

The device (:mod:`other_device`) computes real numbers and lets nothing pass that a graphics card would refuse; and it
counts what a card would be waited for. A step or a descent that reads a number in its loop works on a card too, and
leaves most of it idle: so where the host waits, and how often, is held to what is written here.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from other_device import CARD, HOST, PRODUCTS, OnCard, card
from test_cost import SMALL
from torch import nn

from dmir import fields, losses
from dmir.fields import sampling
from dmir.methods import descending, descent, network, refinement
from dmir.methods.stages import Stage
from dmir.networks import build, hyperparameter_names, network_names
from dmir.training import objective
from dmir.training.data import ImageBank, load_bank
from dmir.training.module import RegistrationModule
from dmir.training.objective import arithmetic
from dmir.training.pack import Scan, pack_scans
from dmir.training.settings import TrainingSettings
from dmir.training.validation import validate
from dmir.volumes import Grid, Volume, write_volume

SHAPE = (16, 20, 24)
READ = {"training/module:RegistrationModule.read_terms": 2}  # every ten steps, for all of them at once
CLOSE = {"float32": 1e-4, "tf32": 1e-4, "bf16": 3e-2}  # of what the CPU computes in float32
STAGES = (Stage(2, 4, update_smoothing=2.0, compression=0.5), Stage(1, 5, momentum=0.5))
# tf32 is a switch of the card's products, which are asked for as in float32: one network tells
RUNS = [*product(network_names(), ("float32", "bf16")), ("voxelmorph", "tf32")]
PAIRS = torch.tensor([[0, 2], [1, 2]])


def smooth(count: int, seed: int = 0) -> torch.Tensor:
    """Return images in [0, 1], (count, *SHAPE), with zeros round them."""
    noise = torch.rand(count, 1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    images = nn.functional.avg_pool3d(noise, 3, 1, 1)[:, 0]
    images[:, :2] = images[:, -2:] = 0
    return images


def quiet(name: str, **hyperparameters) -> dict:
    """Return small hyperparameters without random numbers: on a card attention draws others."""
    silent = {"dropout": 0.0, "drop_path": 0.0}
    chosen = {**SMALL[name], **hyperparameters}
    return chosen | {key: value for key, value in silent.items() if key in hyperparameter_names(name)}


def trained(net, device, settings, held):
    """Return a training of a network, and what takes a step of it as Lightning does."""
    net = net.train().to(device)
    bank = ImageBank(["a", "b", "c"], Grid(SHAPE, np.eye(4)), device, "float16", held=held)
    module = RegistrationModule(net, bank, settings)
    optimiser = module.configure_optimizers()
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0, optimizers=[optimiser])
    return module, lambda: step(module, optimiser)


def fresh(network, hyperparameters):
    torch.manual_seed(0)
    return build(network, SHAPE, **hyperparameters) if isinstance(network, str) else network()


def step(module, optimiser):
    number = module._trainer.global_step
    batch = PAIRS[: module.settings.batch_size]
    module.on_train_batch_start(batch, number)
    optimiser.zero_grad()
    module.training_step(batch, number).backward()
    module.configure_gradient_clipping(optimiser)
    optimiser.step()
    module._trainer.global_step += 1


def on_both(name, settings, hyperparameters):
    """Return the first step's terms on the CPU and on the card, and the card as a second step left it."""
    images = smooth(3).half()
    with arithmetic(settings.precision):
        module, take = trained(fresh(name, hyperparameters), HOST, settings, images)
        take()
        expected = module.read_terms()[0]
        with card() as there:
            module, take = trained(fresh(name, hyperparameters), CARD, settings, there.put(images))
            assert all(isinstance(weight, OnCard) for weight in module.network.parameters())
            take()  # the first one brings onto the card what networks remember
            there.forget()
            before = {key: value.contents.clone() for key, value in module.network.state_dict().items()}
            take()
            queued = dict(there.waits), dict(there.copies)
            found = module.read_terms()
            after = {key: value.contents for key, value in module.network.state_dict().items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    return expected, found[0], there, queued


def products(there):
    """Return the types that matrix products and convolutions are made in."""
    return {dtype for name, dtype, _ in there.types if name in PRODUCTS}


def made_in(name, precision):
    """Return the precision of a network's products: the matching pyramid has none in bfloat16."""
    return "float32" if name == "pyramid" else precision


def require_types(there, precision):
    """Losses, warps and fields in float32 in every precision, products of a network as asked, nothing in float64."""
    assert not [key for key in there.types if key[1] == torch.float64]
    rounded = {(name, where) for name, dtype, where in there.types if dtype in (torch.bfloat16, torch.float16)}
    assert not {where for _, where in rounded if where.startswith(("losses:", "fields/", "filters:", "methods/"))}
    assert not {name for name, _ in rounded if name.startswith(("grid_sampler", "avg_pool3d", "_softmax"))}
    assert (torch.bfloat16 in products(there)) == (precision == "bf16")


# --- a training step ---


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_a_training_step_leaves_the_host_nothing_to_wait_for(name, precision):
    settings = TrainingSettings(precision=precision, gradient_clip=1.0, learning_rate=1e-3)
    expected, found, there, queued = on_both(name, settings, quiet(name))
    assert queued == ({}, {})  # nothing is read and nothing is copied, until the terms of ten steps are
    assert dict(there.waits) == READ
    np.testing.assert_allclose(found, expected, rtol=CLOSE[precision], atol=CLOSE[precision] / 10)
    require_types(there, made_in(name, precision))


VARIANTS = [
    ("voxelmorph", {}, {"similarity": "mse"}),
    ("voxelmorph", {}, {"similarity": "mutual_information"}),
    ("voxelmorph", {}, {"warp": "shifted", "batch_size": 2, "schedule": "cosine"}),
    ("voxelmorph", {"integration_steps": 0}, {"window": 5, "sampling": "random", "smoothing": 0.7, "batch_size": 2}),
    ("caml", {"caml": False, "rbsc": False, "carsc": False}, {"similarity": "mse", "precision": "bf16"}),
    ("caml", {"checkpointing": True}, {"batch_size": 2}),
    ("xmorpher", {"checkpointing": True}, {"precision": "bf16"}),
    ("transmorph", {"checkpointing": True}, {"precision": "bf16"}),
]


@pytest.mark.parametrize(("name", "hyperparameters", "training"), VARIANTS)
def test_the_same_with_other_keys(name, hyperparameters, training):
    settings = TrainingSettings(**training)
    expected, found, there, queued = on_both(name, settings, quiet(name, **hyperparameters))
    assert queued == ({}, {}) and dict(there.waits) == READ
    close = CLOSE[settings.precision]
    np.testing.assert_allclose(found, expected, rtol=close, atol=close / 10)
    require_types(there, settings.precision)


@pytest.mark.parametrize("fits", [True, False], ids=["in the card's memory", "streamed"])
def test_images_of_a_pack_come_by_copies_that_nobody_waits_for(fits, tmp_path, monkeypatch):
    scans = []
    for number, image in enumerate(smooth(3).numpy()):
        scans.append(Scan(f"s{number}", tmp_path / f"s{number}.nii", tmp_path / f"s{number}-labels.nii"))
        write_volume(scans[-1].image, Volume(image, np.eye(4)))
        write_volume(scans[-1].labels, Volume((image > 0.5).astype(np.int32), np.eye(4)), dtype=np.int32)
    pack = pack_scans(tmp_path / "pack", scans)
    split = scans[:1], scans[1:2], scans[2:]
    expected = validated(load_bank(*split, device=HOST, pack=pack))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**30) if fits else (0, 0))
    with card() as there:
        bank = load_bank(*split, device=CARD, pack=pack)
        assert bank.is_resident is fits
        images = bank.images_of([0, 2])
        assert isinstance(images, OnCard) and images.dtype == torch.float32
        torch.testing.assert_close(images.contents, torch.from_numpy(pack.images[[0, 2]]).float()[:, None])
        copied = {key: count for key, count in there.copies.items() if not key[2].endswith("_take_labels")}
        where = "training/data:" + ("_open_scans" if fits else "ImageBank._fetch")
        assert copied == {("in", False, where): 3 if fits else 1}
        assert not there.waits
        found = validated(bank)
    assert found == pytest.approx(expected, rel=1e-5)


def validated(bank):
    """Return the loss and the Dice of an untrained network between the last two scans."""
    torch.manual_seed(0)
    net = build("voxelmorph", SHAPE, **SMALL["voxelmorph"]).to(bank.device)
    found = validate(net, bank, [(1, 2)], TrainingSettings().objective(), "float32")
    return found.loss, found.dice


# --- registration ---


def pair():
    """Return an image that was moved by up to two voxels, and the image: what there is to be found is known."""
    image = nn.functional.avg_pool3d(smooth(1, seed=3)[None], 3, 1, 1)
    image = image / image.amax()
    coarse = torch.randn(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(4))
    moved = fields.warp(image, fields.resize_displacement(coarse, SHAPE).clamp(-2, 2))
    return [Volume(volume[0, 0].numpy(), np.eye(4)) for volume in (moved, image)]


def registered(name, device, precision, refine=None):
    torch.manual_seed(0)
    net = build(name, SHAPE, **quiet(name)).eval()
    with torch.no_grad():
        for weight in net.parameters():  # a field that is not zero, and no smooth one
            weight.add_(0.02 * torch.randn_like(weight))
    metadata = {"network": name, "seed": 1, "grid": {"shape": SHAPE, "spacing": [1.0, 1.0, 1.0]}}
    return network.register(*pair(), (net, metadata), device, precision, refine)


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_an_inference_waits_for_its_field_alone(name, precision):
    expected = registered(name, HOST, "float32")
    with card() as there:
        registered(name, CARD, precision)
        there.forget()
        found = registered(name, CARD, precision)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=CLOSE[precision] * np.abs(expected).max())
    weights = [key for key in there.copies if key[2] == "methods/network:register"]  # network.to(device)
    copies = {key: count for key, count in there.copies.items() if key not in weights}
    assert copies == {
        ("in", False, "methods/network_device:Computer._put_there"): 1,
        ("in", False, "methods/network_device:Computer.register"): 1,
        ("out", False, "methods/network_device:Computer.register"): 1,
    }
    assert dict(there.waits) == {"methods/network_device:Computer.register": 1}  # is it finite?
    require_types(there, made_in(name, precision))


def looks(steps, every):
    """Return how often a descent may look at its similarity: at these steps, and at the last."""
    return sum(number % every == 0 or number == steps for number in range(steps + 1))


def descended(device, similarity, steps, seen=(None, None), **options):
    stages = (*STAGES[:1], Stage(1, steps, momentum=0.5))
    return descent.register(*pair(), device, stages=stages, similarity=similarity, tolerance=-1.0, seen=seen, **options)


@pytest.mark.parametrize("seen", [False, True], ids=["all seen", "not all seen"])
@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_a_descent_waits_when_it_looks_and_at_no_other_time(similarity, seen):
    some = np.ones(SHAPE, dtype=bool)
    some[:, :, :5] = False
    maps = (some, some[:, :, ::-1]) if seen else (None, None)
    expected, waits = descended(HOST, similarity, 5, maps), {}
    for steps in (2, 5):
        with card() as there:
            found = descended(CARD, similarity, steps, maps)
        waits[steps] = dict(there.waits)
        assert there.waits.pop("methods/descending:_run") <= looks(4, 5) + looks(steps, 5) + 2 * (
            1 + descending.HALVINGS
        )
        waited = {place for direction, waits_for, place in there.copies if waits_for}
        assert waited <= {
            "methods/descending:register_volumes.<locals>.on_device",
            "methods/descending:register_volumes",
        }
    assert {key: n for key, n in waits[2].items() if key != "methods/descending:_run"} == dict(there.waits)
    assert set(there.waits) == {"methods/descending:_box", "fields/jacobian:folded_voxels.<locals>.folds"}
    assert np.abs(expected).max() > 0.1  # it moves: two fields of zeros would be alike
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert there.largest[torch.float64] <= max(SHAPE)  # sums of planes alone


def test_a_descent_with_twice_the_steps_between_looks_waits_half_as_often():
    waits = {}
    for every in (2, 4):
        with card() as there:
            descended(CARD, "mse", 8, check_every=every)
        waits[every] = there.waits["methods/descending:_run"]
    assert waits[4] < waits[2] <= looks(4, 2) + looks(8, 2) + 2 * (1 + descending.HALVINGS)


def test_a_refinement_stays_on_the_card_with_the_field_that_it_starts_from():
    def refine(*arguments):
        return refinement.refine(*arguments, stages=STAGES, tolerance=-1.0)

    expected = registered("voxelmorph", HOST, "float32", refine)
    with card() as there:
        found = registered("voxelmorph", CARD, "float32", refine)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert not [
        key for key in there.copies if key[2].startswith(("methods/descending", "methods/refinement", "fields/"))
    ]
    known = {"methods/network_device:Computer.register", "methods/descending:_run", "methods/descending:_box"}
    assert set(there.waits) == {*known, "fields/jacobian:folded_voxels.<locals>.folds"}
    assert there.waits["methods/descending:_run"] <= looks(4, 5) + looks(5, 5) + 2 * (1 + descending.HALVINGS)


# --- faults: each of them is found ---


def faulty(monkeypatch, fault):
    """Let every warp of a step do something more; return the card after a step."""
    right = fields.warp

    def wrong(image, displacement, *arguments, **keywords):
        return right(fault(image), displacement, *arguments, **keywords)

    monkeypatch.setattr("dmir.training.comparison.warp", wrong)
    settings = TrainingSettings(similarity="mse")
    return on_both("voxelmorph", settings, quiet("voxelmorph"))


def test_a_tensor_left_on_the_cpu_is_refused(monkeypatch):
    shift = torch.zeros(1, 1, *SHAPE)
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor in training/comparison:compared: tensors of the CPU"):
        faulty(monkeypatch, lambda image: image + shift.to(image.device if image.device == HOST else HOST))


def test_a_buffer_that_a_module_forgets_to_register_is_refused():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(2, 3, 3, padding=1)
            self.scale = torch.ones(3, 1, 1, 1)

        def forward(self, moving, fixed):
            return self.layer(torch.cat([moving, fixed], dim=1)) * self.scale

    with pytest.raises(RuntimeError, match="tensors of the CPU"):
        on_both(Forgetful, TrainingSettings(), {})


ROUND_TRIPS = {
    "item": lambda image: image * max(1.0, image.amax().item() * 0),
    "float": lambda image: image * (1.0 + 0 * float(image.sum())),
    "bool": lambda image: image if image.sum() > -1 else image * 2,
    "tolist": lambda image: image + 0 * image.flatten()[:1].tolist()[0],
    "mask": lambda image: image + 0 * image[image > 0.5].sum(),
    "write by mask": lambda image: image.clone().index_put_((image > 2,), image.new_zeros(())),
    "nonzero": lambda image: image + 0 * image.nonzero().sum(),
    "unique": lambda image: image + 0 * image.unique().sum(),
}


@pytest.mark.parametrize("fault", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_number_that_is_read_in_a_step_is_found(monkeypatch, fault):
    *_, queued = faulty(monkeypatch, fault)
    assert queued[0] == {"training/comparison:compared": 1}


COPIES = {
    "cpu and back": (lambda image: image.cpu().to(image.device), {("in", True), ("out", True)}),
    "numpy": (lambda image: torch.from_numpy(image.cpu().numpy()).to(image.device), {("in", True), ("out", True)}),
    "a list": (lambda image: image * torch.tensor([1.0], device=image.device), {("in", True)}),
    "new_tensor": (lambda image: image * image.new_tensor([1.0]), {("in", True)}),
    "pageable": (lambda image: image + torch.zeros(SHAPE).to(image.device, non_blocking=True), {("in", True)}),
    "page-locked, waited for": (lambda image: image + locked().to(image.device), {("in", True)}),
    "page-locked": (lambda image: image + locked().to(image.device, non_blocking=True), {("in", False)}),
}


def locked():
    return torch.zeros(SHAPE).pin_memory() if torch.overrides._get_current_function_mode() else torch.zeros(SHAPE)


@pytest.mark.parametrize(("fault", "found"), COPIES.values(), ids=COPIES)
def test_a_copy_between_host_and_card_in_a_step_is_found(monkeypatch, fault, found):
    *_, queued = faulty(monkeypatch, fault)
    assert {(direction, waited) for direction, waited, _ in queued[1]} == found


@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.float64])
def test_a_wrong_type_in_a_step_is_found(monkeypatch, wrong):
    right = sampling.normalised
    monkeypatch.setattr(sampling, "normalised", lambda place, size: right(place.to(wrong), size).float())
    *_, there, _ = on_both("voxelmorph", TrainingSettings(), quiet("voxelmorph"))
    with pytest.raises(AssertionError):
        require_types(there, "float32")


def test_products_that_stay_in_float32_are_found(monkeypatch):
    monkeypatch.setattr(objective, "has_bfloat16", lambda kind: False)
    monkeypatch.setattr(objective.has_bfloat16, "cache_clear", lambda: None, raising=False)
    *_, there, _ = on_both("voxelmorph", TrainingSettings(precision="bf16"), quiet("voxelmorph"))
    with pytest.raises(AssertionError):
        require_types(there, "bf16")


def test_types_that_do_not_agree_are_refused(monkeypatch):
    def mixed(image):
        weight = image.new_ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
        return torch.conv3d(image, weight if isinstance(image, OnCard) else weight.float())

    with pytest.raises(RuntimeError, match="type"):
        faulty(monkeypatch, mixed)


def test_a_number_that_is_read_in_every_step_of_a_descent_is_found(monkeypatch):
    right = descending._Stepper.advance

    def reads(self):
        assert float(self.longest) >= 0
        right(self)

    monkeypatch.setattr(descending._Stepper, "advance", reads)
    with card() as there:
        descended(CARD, "mse", 8, check_every=4)
    assert there.waits["methods/descending:_run"] > looks(4, 4) + looks(8, 4) + 2 * (1 + descending.HALVINGS)


def test_the_card_casts_as_torch_says_a_card_does():
    with card() as there, torch.autocast("cuda", dtype=torch.bfloat16):
        image, weight = there.put(torch.rand(1, 2, 4, 4, 4)), there.put(torch.rand(2, 2, 3, 3, 3))
        convolved = nn.functional.conv3d(image, weight)
        assert convolved.dtype == (image @ image.mT).dtype == torch.bfloat16
        assert convolved.softmax(dim=1).dtype == convolved.exp().dtype == torch.float32
        assert nn.functional.layer_norm(convolved, convolved.shape[1:]).dtype == torch.float32
        assert torch.cat([convolved, convolved.float()]).dtype == torch.float32
        assert (convolved * 2.0).dtype == nn.functional.relu(convolved).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert nn.functional.conv3d(image, weight).dtype == torch.float32
