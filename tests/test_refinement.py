"""Refinement: descent from any method's field, and a row of its own in configuration, pipeline and report."""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import gaussian_filter

from dmir import networks
from dmir.config import Network, Refinement, parse_config
from dmir.config.base import ConfigError
from dmir.errors import InputError
from dmir.fields import folded_voxels, integrate, load_field, warp
from dmir.losses import lncc, mse, mutual_information
from dmir.methods import refinement, register
from dmir.methods.descending import find_field
from dmir.methods.isolated import register_isolated
from dmir.methods.network import register_pairs
from dmir.methods.refinement import refine
from dmir.methods.stages import Stage
from dmir.report.names import method_name
from dmir.report.style import METHOD_COLOURS, method_colours, method_markers
from dmir.training.weights import save_weights
from dmir.volumes import Grid, Volume, write_volume

ROOT = Path(__file__).parents[1]
SHAPE = (20, 24, 22)
ONE = (Stage(1, 6),)


def smooth(seed, sigma, shape=SHAPE):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return (noise / noise.std()).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    """A textured image, the same warped by exp(v), and exp(-v), which brings the first back onto the second."""
    fixed = torch.from_numpy(np.clip(0.5 + 0.2 * smooth(1, 1.2) + 0.1 * smooth(2, 2.5), 0, 1))[None, None]
    velocity = torch.from_numpy(np.stack([smooth(10 + k, 4.0) for k in range(3)]))[None] * 0.8
    return warp(fixed, integrate(velocity), padding="border"), fixed, integrate(-velocity)


@pytest.fixture(scope="module")
def start(pair):
    """What a network might give: two thirds of the truth, roughened."""
    rough = torch.from_numpy(np.stack([smooth(30 + k, 2.0) for k in range(3)]))[None]
    return pair[2] * 0.66 + 0.1 * rough


def likeness(pair, displacement, similarity=lncc):
    return float(similarity(pair[1], warp(pair[0], displacement), *([5] if similarity is lncc else [])))


def error(pair, displacement):
    """Mean endpoint error away from the border, voxels."""
    inside = (slice(None), *(slice(3, -3),) * 3)
    return float((displacement - pair[2]).square().sum(dim=1).sqrt()[inside].mean())


def test_the_truth_is_approached_without_folding(pair, start):
    refined = refine(*pair[:2], start)
    assert refined.shape == start.shape and refined.dtype == torch.float32
    assert error(pair, start) > 0.3
    assert error(pair, refined) < 0.6 * error(pair, start)
    assert folded_voxels(refined[0]) == 0


@pytest.mark.parametrize(
    ("similarity", "better"),
    [("lncc", lncc), ("mse", lambda f, w: -mse(f, w)), ("mutual_information", mutual_information)],
)
def test_the_images_are_more_alike_than_at_the_start(similarity, better, pair, start):
    refined = refine(*pair[:2], start, stages=[Stage(1, 10)], similarity=similarity)
    assert likeness(pair, refined, better) > likeness(pair, start, better)


def test_no_stage_is_no_change(pair, start):
    assert torch.equal(refine(*pair[:2], start, stages=[]), start)


def test_the_same_bits_every_time_and_inputs_untouched(pair, start):
    before = start.clone()
    first = refine(*pair[:2], start, stages=ONE)
    assert torch.equal(first, refine(*pair[:2], start, stages=ONE))
    assert torch.equal(start, before) and not first.requires_grad


def test_it_works_on_what_inference_mode_made(pair, start):
    expected = refine(*pair[:2], start, stages=ONE)
    with torch.inference_mode():
        made = [tensor.clone() for tensor in (*pair[:2], start)]
        assert torch.equal(refine(*made, stages=ONE), expected)
    assert torch.equal(refine(*made, stages=ONE), expected)


def test_it_is_descent_from_that_start(pair, start):
    """One code path: without a start the same stages are the same bits."""
    nothing = torch.zeros_like(start)
    found = find_field(pair[0][0], pair[1][0], (1, 1, 1), stages=ONE).displacement
    assert torch.equal(refine(*pair[:2], nothing, stages=ONE)[0], found)


# --- as a method ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    built = networks.build("voxelmorph", (16, 16, 16), encoder=[4, 4], decoder=[4, 4, 4], integration_steps=0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    training = {"similarity": "mse", "window": 5, "regularisation": 0.01}
    save_weights(
        path, built, name="voxelmorph", hyperparameters=built.hyperparameters, grid=Grid((16, 16, 16), np.eye(4)),
        seed=1, extra={"training": training},
    )  # fmt: skip
    return path


def test_two_volumes_are_registered_and_refined_by_the_similarity_of_the_training(pair, weights):
    moving, fixed = (Volume(image[0, 0].numpy(), np.eye(4)) for image in pair[:2])
    plain = register(moving, fixed, str(weights), device="cpu")
    refined = register(moving, fixed, "refinement", weights=weights, stages=ONE, device="cpu")
    expected = refine(*pair[:2], torch.from_numpy(plain)[None], stages=ONE, similarity="mse")[0].numpy()
    assert np.array_equal(refined, expected)
    assert not np.array_equal(refined, plain)
    with pytest.raises(InputError, match="'refinement' without weights"):
        register(moving, fixed, "refinement")
    with pytest.raises(InputError, match="both weights and of"):
        register(moving, fixed, "refinement", weights=weights, of={"algorithm": "affine"})


def test_any_other_methods_field_is_refined(pair):
    moving, fixed = (Volume(image[0, 0].numpy(), np.eye(4)) for image in pair[:2])
    syn = {"algorithm": "syn", "iterations": (10, 5)}
    plain = register(moving, fixed, "syn", iterations=(10, 5))
    refined = register(moving, fixed, "refinement", of=syn, stages=ONE, device="cpu")
    expected = refine(*pair[:2], torch.from_numpy(plain)[None], stages=ONE)[0].numpy()
    assert np.array_equal(refined, expected)
    from_nothing = register(moving, fixed, "refinement", of={"algorithm": "affine"}, stages=ONE, device="cpu")
    assert np.array_equal(from_nothing, register(moving, fixed, "descent", stages=ONE, device="cpu"))


def test_pairs_of_files_are_refined_and_their_inverse_is_told(pair, weights, tmp_path):
    for name, image in zip(("moving", "fixed"), pair[:2], strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(image[0, 0].numpy(), np.eye(4)))
    files = [("m", tmp_path / "moving.nii.gz", "f", tmp_path / "fixed.nii.gz")]
    calls = []

    def watched(*given):
        calls.append([*(tuple(tensor.shape) for tensor in given[:3]), given[3]])
        return refine(*given, stages=ONE)

    plain = register_pairs(files, tmp_path / "plain", weights, device="cpu")
    records = register_pairs(files, tmp_path / "refined", weights, device="cpu", refine=watched)
    assert (records.status == "ok").all() and (plain.status == "ok").all()
    assert calls == [[(1, 1, *SHAPE), (1, 1, *SHAPE), (1, 3, *SHAPE), [1.0, 1.0, 1.0]]] * 2  # once to warm up
    before, after = (
        torch.from_numpy(load_field(tmp_path / name / "m__f.nii")[0])[None] for name in ("plain", "refined")
    )
    assert likeness(pair, after) > likeness(pair, before)
    assert plain.inverse_mean.isna().all() and float(records.inverse_mean[0]) < 0.05


def test_a_refinement_of_files_knows_what_a_scan_never_saw(pair, weights, tmp_path):
    for name, image in zip(("moving", "fixed"), pair[:2], strict=True):
        write_volume(tmp_path / name / "image.nii.gz", Volume(image[0, 0].numpy(), np.eye(4)))
    (tmp_path / "moving" / "quality.json").write_text('{"cut_planes": [[0, 0, 1, -9]]}')  # nothing above z = 9
    files = [("m", tmp_path / "moving" / "image.nii.gz", "f", tmp_path / "fixed" / "image.nii.gz")]
    known = []

    def watched(*given, seen):
        known.append(seen)
        return refine(*given, stages=ONE, seen=seen)

    assert (register_pairs(files, tmp_path / "u", weights, device="cpu", refine=watched).status == "ok").all()
    moving, fixed = known[-1]
    assert fixed is None and tuple(moving.shape) == (1, *SHAPE)
    assert moving[..., :10].all() and not moving[..., 10:].any()


def test_a_descent_in_a_process_of_its_own_records_its_inverse(pair, tmp_path):
    for name, image in zip(("moving", "fixed"), pair[:2], strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(image[0, 0].numpy(), np.eye(4)))
    files = (tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz", tmp_path / "u.nii")
    stages = {"stages": [{"voxel": 1, "steps": 5}]}
    record = register_isolated(*files, "refinement", {"of": {"algorithm": "affine"}, **stages})
    assert record["status"] == "ok" and record["device"]
    assert record["inverse_mean"] < 0.05 and record["inverse_worst"] < 0.5
    failed = register_isolated(*files, "descent", {**stages, "similarity": "ssd"})
    assert failed["status"] == "failed" and "similarity" in failed["reason"]


# --- in the configuration and the report ---


def configuration(**settings):
    values = copy.deepcopy(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()))
    values["settings"] |= settings
    values["methods"] = [*values["methods"], *(name for name in settings if name not in values["methods"])]
    return parse_config(values, "mine.yaml")


def test_a_refinement_uses_the_weights_and_the_similarity_of_its_network():
    given = configuration(fine={"algorithm": "refinement", "of": "caml", "tolerance": 0.01})
    settings, network = given.method("fine"), given.method("caml")
    assert isinstance(settings, Refinement) and isinstance(network, Network)
    assert (settings.similarity, settings.tolerance) == (network.training["similarity"], 0.01)
    assert given.network_of("fine") == given.network_of("caml") == "caml"
    assert given.network_of("syn") is None
    assert "fine" not in given.networks() and given.networks().count("caml") == 1


def test_a_refinement_of_a_method_without_weights_takes_its_parameters():
    given = configuration(fine={"algorithm": "refinement", "of": "syn"})
    assert given.network_of("fine") is None and given.models_of("fine") == ["none"] and given.takes_card("fine")
    assert given.parameters("fine")["of"] == {"algorithm": "syn", **given.parameters("syn")}
    assert given.parameters("syn")["iterations"] == [40, 20, 2]
    assert not given.takes_card("syn") and not given.takes_card("caml-refined") and given.takes_card("descent")


def test_a_network_that_is_there_to_be_refined_alone_is_trained():
    given = configuration(wide={"algorithm": "voxelmorph"}, fine={"algorithm": "refinement", "of": "wide"})
    alone = parse_config({**given.model_dump(mode="json"), "methods": ["affine", "fine"]}, "mine.yaml")
    assert alone.networks() == ["wide"]


def test_a_row_of_a_study_can_be_refined():
    study = {"algorithm": "refinement", "of": "caml-without-carsc"}
    values = configuration().model_dump(mode="json")
    values |= {"methods": ["caml-without-carsc", "fine"], "settings": {**values["settings"], "fine": study}}
    assert parse_config(values, "mine.yaml").networks() == ["caml-without-carsc"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"of": "camll"}, "settings.fine: of: found 'camll', no method of this configuration. Did you mean 'caml'?"),
        ({"of": "caml-refined"}, "found 'caml-refined', a refinement itself; expected a network or a classical method"),
        ({"of": "fine"}, "a refinement itself"),
        ({}, "settings.fine.of: found nothing; this key is required"),
        ({"of": "caml", "stage": []}, "settings.fine.stage: found an unknown key. Did you mean 'stages'?"),
        ({"of": "caml", "stages": [{"voxel": 2, "steps": 3, "window": 6}]}, "window: found 6; expected an odd number"),
        ({"of": "caml", "stages": [{"voxel": 2, "steps": -1}]}, "settings.fine.stages.0.steps"),
        ({"of": "caml", "stages": [{"voxel": 2, "steps": 1, "step": 2}]}, "settings.fine.stages.0.step: found 2"),
    ],
)
def test_a_mistake_is_told_with_its_key(settings, words):
    with pytest.raises(ConfigError) as told:
        configuration(fine={"algorithm": "refinement", **settings})
    assert len(told.value.problems) == 1
    assert words in told.value.problems[0]


def test_a_study_trains_networks_alone():
    values = configuration().model_dump(mode="json")
    values["lambda_study"] = {"methods": ["caml-refined"]}
    with pytest.raises(ConfigError, match="lambda_study: 'caml-refined' is no network"):
        parse_config(values, "mine.yaml")


@pytest.mark.parametrize("function", [refine, refinement.register])
def test_the_keys_of_the_configuration_are_parameters_with_the_same_defaults(function):
    keywords = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    keywords = {name: value for name, value in keywords.items() if name not in ("of", "seen", "watch")}
    fields = {key: field.default for key, field in Refinement.model_fields.items() if key not in ("algorithm", "of")}
    assert set(fields) == set(keywords)
    stages = keywords.pop("stages")
    assert [stage.model_dump() for stage in fields.pop("stages")] == [asdict(stage) for stage in stages]
    assert fields == keywords
    given = configuration().method("caml-refined").model_dump(mode="json", exclude={"algorithm", "of"})
    partial(refine, **given)(torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8))


@pytest.mark.parametrize("name", ["config.yaml", "paper.yaml"])
def test_the_committed_configurations_refine_the_proposed_network(name):
    given = parse_config(yaml.safe_load((ROOT / "config" / name).read_text()), name)
    assert "caml-refined" in given.methods and given.network_of("caml-refined") == "caml"


def test_its_row_has_a_name_a_colour_and_a_marker_of_its_own():
    assert method_name("caml-refined") == method_name("caml-refined", short=True) == "Proposed + refinement"
    assert method_name("voxelmorph-refined") == "VoxelMorph + refinement"
    assert method_name("mine-refined") == "mine-refined"
    assert method_colours(["caml", "caml-refined"])["caml-refined"] == METHOD_COLOURS["caml-refined"]
    markers = method_markers(["caml", "caml-refined", "a", "b", "c", "d", "e"])
    assert list(markers.values()).count(markers["caml-refined"]) == 1
