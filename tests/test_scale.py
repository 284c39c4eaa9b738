"""Shards, disk quota and the size of workflows: no short job, no more fields at once than fit, nothing done twice."""

import importlib
import itertools
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from workflow_runs import checkout, snakemake

from dmir.config import parse_config, read_config
from dmir.errors import InputError
from dmir.planning import quota
from dmir.planning.batches import count_batches
from dmir.planning.costs import STARTUP, registration_seconds, scoring_seconds
from dmir.planning.jobs import CohortSize, cohort_size, used_cohorts
from dmir.planning.plan import disk_parts
from dmir.planning.quota import FieldShard
from dmir.planning.shards import MOST_FIELDS, MOST_SHARDS, by_scan, pairs_per_shard, shard_sizes, shards_of

ROOT = Path(__file__).parents[1]
PAIRS = [(f"scan-{k}", f"atlas-{j}") for j in range(4) for k in range(145)]


@pytest.fixture(scope="module")
def paper():
    return read_config(ROOT / "config" / "paper.yaml").model_copy(update={"root": "no such folder"})


@pytest.fixture(scope="module")
def sizes(paper):
    return {name: cohort_size(paper, name) for name in used_cohorts(paper)}


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("scale")
    sys.path.pop(0)


# --- shards ---


def test_no_job_is_shorter_than_its_start(paper):
    for method, pairs in itertools.product(paper.methods, (175, 580, 3984)):
        for size in shard_sizes(paper, method, pairs):
            assert size * registration_seconds(paper, method) > STARTUP
            assert size * scoring_seconds(paper) > STARTUP


def test_shards_hold_every_pair_once_and_are_of_one_size(paper):
    for method in paper.methods:
        shards = shards_of(paper, method, PAIRS)
        assert sorted(itertools.chain(*shards.values())) == sorted(PAIRS)
        lengths = {len(members) for members in shards.values()}
        assert max(lengths) - min(lengths) <= 1
        assert list(shards) == sorted(shards)


def test_slow_methods_get_few_pairs_and_fast_ones_many(paper):
    """SyN takes hours a pair: as many as scoring needs to be longer than its start, which are two of 4 s."""
    assert pairs_per_shard(paper, "syn") == 2
    assert pairs_per_shard(paper, "syn") < pairs_per_shard(paper, "elastix") < pairs_per_shard(paper, "caml")
    assert pairs_per_shard(paper, "caml-refined") < pairs_per_shard(paper, "caml")


def test_a_small_test_set_is_one_job_and_a_huge_one_has_a_thousand(paper):
    default = read_config(ROOT / "config" / "config.yaml")
    assert all(shard_sizes(default, method, pairs) == [pairs] for method in default.methods for pairs in (4, 5))
    assert len(shard_sizes(paper, "syn", 50_000)) == MOST_SHARDS
    names = list(shards_of(paper, "syn", [("a", str(k)) for k in range(50_000)]))
    assert (names[0], names[-1], names == sorted(names)) == ("shard000", "shard999", True)
    assert shard_sizes(paper, "affine", 0) == []


def test_the_fields_of_a_shard_do_not_fill_a_disk(paper):
    one = 3 * 4 * 160 * 192 * 224
    assert max(max(shard_sizes(paper, method, 580)) for method in paper.methods) * one <= MOST_FIELDS


def test_a_number_of_pairs_means_what_it_says(paper):
    given = paper.model_copy(update={"pairs_per_job": 8})
    assert shard_sizes(given, "syn", 20) == shard_sizes(given, "caml", 20) == [8, 8, 4]
    many = parse_config({**paper.model_dump(mode="json"), "pairs_per_job": 1})
    names = list(shards_of(many, "affine", [("a", str(k)) for k in range(1001)]))
    assert (names[0], names[-1], names == sorted(names)) == ("shard0000", "shard1000", True)


def test_neither_seeds_nor_disk_nor_limits_change_the_shards(paper):
    other = {"seeds": [7], "disk_quota_gb": 300.0, "timeout_minutes": 5.0, "keep_fields": True}
    changed = paper.model_copy(update=other)
    for method in paper.methods:
        assert shard_sizes(changed, method, 580) == shard_sizes(paper, method, 580)


def test_pairs_of_one_scan_stand_together():
    ordered = by_scan(PAIRS)
    assert [moving for moving, _ in itertools.groupby(ordered, key=lambda pair: pair[0])] == [
        f"scan-{k}" for k in range(145)
    ]
    turned = [(fixed, moving) for moving, fixed in PAIRS]
    assert by_scan(turned) == [(fixed, moving) for moving, fixed in ordered]
    alone = [("a", "t"), ("b", "t")]
    assert by_scan(alone) == alone


# --- the quota ---


def shards(method, count, size, seconds=1.0):
    return [FieldShard(f"c/{method}/none/shard{k:03d}", method, size, seconds) for k in range(count)]


def most_alive(all_shards, waits):
    """Return the most bytes of fields at once, whichever order the jobs that may run are run in."""
    rng, most = np.random.default_rng(1), 0
    for _ in range(50):
        done, alive, left = set(), {}, {shard.run: shard.size for shard in all_shards}
        while left or alive:
            ready = [run for run in left if waits.get(run) is None or waits[run] in done]
            # start all that may start, or finish one: what is worst for the disk, in any order
            if ready and (not alive or rng.random() < 0.8):
                run = ready[rng.integers(len(ready))]
                alive[run] = left.pop(run)
                most = max(most, sum(alive.values()))
            else:
                run = list(alive)[rng.integers(len(alive))]
                done.add(run)
                del alive[run]
    return most


@pytest.mark.parametrize("room", [40, 99, 100, 250, 10_000])
def test_fields_never_outgrow_their_room(room):
    found = [*shards("syn", 9, 4, 100.0), *shards("caml", 5, 40), *shards("affine", 2, 30)]
    lanes = quota.lanes(found, room)
    assert most_alive(found, lanes.waits) <= min(room, lanes.peak())
    if room == 10_000:
        assert lanes.waits == {}
    if room == 100:  # one lane of each, and of 26 bytes more six for the method that takes longest
        assert lanes.widths == {"syn": 7, "caml": 1, "affine": 1}


def test_a_method_waits_for_itself_alone_where_there_is_room():
    found = [*shards("syn", 9, 4), *shards("caml", 5, 40)]
    waits = quota.lanes(found, 60).waits
    assert all(run.split("/")[1] == before.split("/")[1] for run, before in waits.items())


def test_a_study_follows_the_method_that_it_shares():
    main = [*shards("syn", 3, 4), *shards("caml", 3, 40)]
    own = [*shards("caml-without-rbsc", 3, 40), *shards("caml-without-carsc", 3, 40)]
    lanes = quota.lanes(main, 124)  # three lanes of syn, two of caml
    study = quota.lanes_of_study(lanes, own, ["caml", "caml-without-rbsc", "caml-without-carsc"], 124)
    waits = {**lanes.waits, **study.waits}
    assert waits["c/caml-without-rbsc/none/shard000"] == "c/caml/none/shard001"
    assert not any("/syn/" in before for run, before in waits.items() if "/caml" in run)
    assert most_alive([*main, *own], waits) <= 124
    alone = quota.lanes_of_study(lanes, own, ["caml-without-rbsc", "caml-without-carsc"], 124)
    assert not any("/caml/" in before for before in alone.waits.values())
    assert most_alive(own, alone.waits) <= 124


def test_a_quota_that_nothing_fits_under_is_refused_with_its_figures(paper, sizes):
    with pytest.raises(
        InputError, match=r"disk_quota_gb: found 20; expected at least \d+\.\d\d GB .*preprocessed scans"
    ):
        quota.room_for_fields(paper.model_copy(update={"disk_quota_gb": 20.0}), sizes)
    least = sum(quota.staying_bytes(paper, sizes).values())
    largest = max(shard.size for shard in quota.field_shards(paper, paper.methods, sizes))
    enough = paper.model_copy(update={"disk_quota_gb": (least + largest + 1e6) / 1e9})
    assert quota.room_for_fields(enough, sizes) >= largest
    # fields that are kept stay, and so none waits for another
    kept = paper.model_copy(update={"disk_quota_gb": 5000.0, "keep_fields": True})
    assert quota.room_for_fields(kept, sizes) is None
    with pytest.raises(InputError, match="fields, kept"):
        quota.room_for_fields(kept.model_copy(update={"disk_quota_gb": 500.0}), sizes)


def test_pairs_that_are_registered_both_ways_count_twice(paper):
    once, twice = (
        {name: CohortSize({"test": 9, "atlas": 1}, 9, ways * 9, "data") for name in paper.test_on} for ways in (1, 2)
    )
    counted = [sum(s.size for s in quota.field_shards(paper, ["syn"], sizes)) for sizes in (once, twice)]
    assert counted == [18 * 12 * 160 * 192 * 224, 36 * 12 * 160 * 192 * 224]


def test_the_plan_tells_what_stays_and_what_peaks(paper, sizes):
    parts = disk_parts(paper.model_copy(update={"disk_quota_gb": 200.0}), sizes)
    runs = 4 + 8 * 3  # affine, syn, elastix, descent; seven networks and a refinement with three seeds
    every = next(size for what, size in parts.items() if "all jobs at once" in what)
    assert every == pytest.approx(runs * (580 + 175) * 12 * 160 * 192 * 224 / 1e9)
    assert parts["stays in all"] == pytest.approx(sum(v for k, v in parts.items() if k.startswith("stays: ")))
    assert parts["stays in all"] + parts["under the quota, at most"] <= 200.0


# --- Snakemake ---


@pytest.mark.pipeline
def test_the_paper_with_all_its_scans(scale, tmp_path):
    """445 test, training and atlas scans, twelve methods, three seeds: so many jobs, in so little memory."""
    config = scale.paper_of(tmp_path / "data", 450)
    found = scale.dry_run(tmp_path, config)
    assert found["mb"] < 1000
    counts, configuration = found["jobs"], read_config(config)
    sizes = {name: cohort_size(configuration, name) for name in used_cohorts(configuration)}
    batches = [count_batches(configuration, name, size) for name, size in sizes.items()]
    assert counts["preprocess_scans"] == sum(batches) < sum(size.total for size in sizes.values()) / 8
    assert counts["train"] == 7 * 3
    registrations = sum(counts[f"register_{kind}"] for kind in ("classical", "descent", "network"))
    assert (
        registrations == counts["score_shard"] == len(quota.field_shards(configuration, configuration.methods, sizes))
    )
    assert counts["total"] < 2700


def tiny(folder):
    """Write three scans and four pairs of them, and return a configuration with a job for each pair."""
    rng = np.random.default_rng(1)
    ball = sum(x**2 for x in np.meshgrid(*[np.linspace(-1.3, 1.3, 16)] * 3, indexing="ij")) < 1
    rows = []
    for name in ("a", "b", "c"):
        volumes = {
            "image": ball * (100 + 20 * rng.random(ball.shape)),
            "labels": ball * (1 + (rng.random(ball.shape) > 0.5)),
        }
        for key, data in volumes.items():
            kind = np.float32 if key == "image" else np.int16
            image = nibabel.Nifti1Image(data.astype(kind), np.diag([8.0, 8.0, 8.0, 1.0]))
            nibabel.save(image, folder / f"{name}-{key}.nii.gz")
        rows.append({"scan": name, "subject": name, "split": "test"} | {k: f"{name}-{k}.nii.gz" for k in volumes})
    pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
    (folder / "pairs.csv").write_text("moving,fixed\na,b\na,c\nb,a\nc,a\n")
    cohort = {"source": "table", "table": "scans.csv", "structures": "tissue3", "pairs": "pairs.csv"}
    return {
        "root": str(folder),
        "train_on": "own",
        "test_on": ["own"],
        "methods": ["affine"],
        "pairs_per_job": 1,
        "grid": {"shape": [16, 16, 16], "spacing": 8.0},
        "cohorts": {"own": cohort},
        "preprocess": {"skull_strip": "none", "bias_correction": False, "affine": False},
    }


@pytest.mark.pipeline
def test_with_a_quota_two_shards_live_at_once_and_changing_it_runs_nothing_again(tmp_path):
    values = tiny(tmp_path)
    configuration = parse_config(values)
    sizes = {"own": cohort_size(configuration, "own")}
    one = 12 * 16**3
    for_two = (sum(quota.staying_bytes(configuration, sizes).values()) + 2.5 * one) / 1e9
    (tmp_path / "checkout").mkdir()
    folder = checkout(tmp_path / "checkout", values)
    target, example = "results/scores/pairs.parquet", "results/registered/own/affine/none/examples-shard000"
    text = snakemake(folder, target, example, "--config", f"disk_quota_gb={for_two}")
    alive, seen = set(), []
    for line in text.splitlines():
        if match := re.search(r"output: (results/registered/own/affine/none/shard\d+),", line):
            alive.add(match[1])
        if match := re.search(r"Removing temporary output (\S+)\.$", line):
            alive.remove(match[1])
        seen.append(len(alive))
    assert max(seen) == 2
    assert not alive
    assert (folder / example / "a__b.npz").is_file()
    assert len(pd.read_parquet(folder / target)) == 4
    for quota_now in (for_two, 50.0, None):  # as it was, changed, taken away
        given = [] if quota_now is None else ["--config", f"disk_quota_gb={quota_now}"]
        assert "Nothing to be done" in snakemake(folder, target, example, "-n", *given)
    refused = snakemake(folder, target, "-n", "--config", "disk_quota_gb=0.01", succeeds=False)
    assert "disk_quota_gb: found 0.01; expected at least" in refused
