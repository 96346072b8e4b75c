"""What tools/{train,test}_{det,seg}.py look for in data before they begin: each fault in one line.

Everything is read by the config's own datasets: files, classes, wrappers, and what they leave out.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmseg.datasets import BaseSegDataset

from mm_checks.coco import check_coco
from mm_checks.findings import Findings
from mm_checks.masks import check_masks
from mm_checks.pictures import not_a_file
from visattn.weights import first_line

SECONDS = 50.0  # for all images of a run
OTHER_NUMBERS = ("backbone", "neck", "rpn_head", "semantic_head", "train_cfg", "test_cfg")
EDGES = "STDCHead"  # its two classes are edges, which it makes itself


def check_data(config: Config, job: str, seconds: float = SECONDS) -> tuple[Findings, str]:
    """Check annotations, masks and images of a config.

    Args:
        config: Of mmdet or mmseg.
        job: "train", which looks at the sets of training and validation, or "test".
        seconds: For reading images: where that is not enough for all, a random sample, always of the same order.

    Returns:
        What is wrong, and one line on what there is.
    """
    findings = Findings(config.filename or "the config")
    wanted = ("train", "val") if job == "train" else ("test",)
    sets = {part: (config.get(f"{part}_dataloader") or {}).get("dataset") for part in wanted}
    if not sets[wanted[0]]:
        findings.add(
            findings.config, "no data", f"a dataset in {wanted[0]}_dataloader", "none", "a base file with data"
        )
    leaves = [(part, leaf) for part, data in sets.items() if data for leaf in _leaves(data)]
    said = {}
    classes = []
    for part, leaf in leaves:
        dataset = _build(config, leaf, findings)
        if dataset is None:
            continue
        what = _check(config, part, leaf, dataset, findings, seconds / len(leaves))
        said[part] = f"{said[part]} and {what}" if part in said else f"{part} {what}"
        classes.append(list(dataset.metainfo.get("classes") or ()))
    if classes and not findings.lines("error"):
        _check_heads(config, classes[0], findings)
        if other := [names for names in classes if names != classes[0]]:
            expected = f"the classes {reprlib.repr(classes[0])} in every set"
            findings.add(findings.config, "other classes", expected, other[0], "one metainfo for all")
    return findings, f"data: {'; '.join(said.values()) or 'none'}"


def _parts(value: Any, key: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (dotted key, part) of every dict within a part of a config."""
    if isinstance(value, dict):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, item in items:
        yield from _parts(item, f"{key}.{name}")


def _leaves(dataset: Any) -> Iterator[Any]:
    """Yield the datasets inside wrappers."""
    if "datasets" in dataset:
        for inner in dataset["datasets"]:
            yield from _leaves(inner)
    elif "dataset" in dataset:
        yield from _leaves(dataset["dataset"])
    else:
        yield dataset


def _build(config: Config, leaf: Any, findings: Findings) -> Any:
    """The dataset before it has read anything; None with a finding where there is none."""
    root = leaf.get("data_root")
    if root and (got := not_a_file(root)) != "a folder" and not leaf.get("backend_args"):
        findings.add(root, "root", "a folder of data", got or "a file", "data_root=FOLDER in the config's datasets")
        return None
    try:
        with DefaultScope.overwrite_default_scope(config.default_scope):
            return DATASETS.build({**leaf, "pipeline": [], "lazy_init": True})
    except Exception as error:  # whatever a dataset's own __init__ raises for what it is given
        got = f"{type(error).__name__}: {first_line(error)}"
        advice = "other data_root, ann_file, data_prefix or metainfo"
        findings.add(findings.config, "dataset", f"a dataset {leaf.get('type')}", got, advice)
        return None


def _check(config: Config, part: str, leaf: Any, dataset: Any, findings: Findings, seconds: float) -> str:
    steps = [step for _, step in _parts(config[f"{part}_dataloader"])]
    usual = any(_reads(step, "LoadImageFromFile") for step in steps)
    loading = [step for step in steps if "Annotations" in str(step.get("type"))]
    if leaf.get("backend_args"):
        return "not checked, as it is not on a disk"
    if type(dataset).load_data_list is CocoDataset.load_data_list:
        evaluators = config.get(f"{part}_evaluator") or []
        evaluators = [evaluators] if isinstance(evaluators, dict) else evaluators
        masks = [step for step in loading if step.get("with_mask")]
        return check_coco(
            dataset,
            findings,
            part="unlabelled" if any(evaluator.get("format_only") for evaluator in evaluators) else part,
            masks=bool(masks),
            polygons=any(step.get("poly2mask") is False for step in masks),
            evaluated=[evaluator["ann_file"] for evaluator in evaluators if evaluator.get("ann_file")],
            decode=usual,
            seconds=seconds,
        )
    if isinstance(dataset, BaseSegDataset) and type(dataset).load_data_list is BaseSegDataset.load_data_list:
        for step in loading:
            if step.get("reduce_zero_label") not in (None, dataset.reduce_zero_label):
                got = f"{step.reduce_zero_label} in its pipeline"
                expected = f"reduce_zero_label={dataset.reduce_zero_label} as the dataset has it"
                findings.add(findings.config, "zero", expected, got, "reduce_zero_label in the dataset alone")
        if not loading:
            return "not checked, as its pipeline reads no masks"
        if not usual or not all(_reads(step, "LoadAnnotations") for step in loading):
            return "not checked, as its pipeline reads files in a way of its own"
        heads = [head for _, head in _heads(config.model)]
        return check_masks(
            dataset,
            findings,
            labels=min(map(_labels, heads), default=len(dataset.metainfo.get("classes") or range(256))),
            ignored=heads[0].get("ignore_index", 255) if heads else 255,
            shared=_is_shared(config, leaf),
            palettes=all(step.get("imdecode_backend") != "cv2" for step in loading),
            trains=part == "train",
            seconds=seconds,
        )
    return f"not checked, as {type(dataset).__name__} is of another format"


def _reads(step: dict, name: str) -> bool:
    """Whether a step of a pipeline is the usual one of that name, which reads files that Pillow reads too."""
    kind = step.get("type")
    found = getattr(kind, "__name__", str(kind)).rpartition(".")[2]
    return found == name and step.get("imdecode_backend") != "tifffile"


def _is_shared(config: Config, leaf: Any) -> bool:
    """Whether another dataset of the config has other images with masks in the same folder."""
    sets = [(config.get(f"{part}_dataloader") or {}).get("dataset") or {} for part in ("train", "val", "test")]
    return any(
        other.get("data_root") == leaf.get("data_root")
        and other["data_prefix"].get("seg_map_path") == leaf["data_prefix"].get("seg_map_path")
        and other["data_prefix"].get("img_path") != leaf["data_prefix"].get("img_path")
        for data in sets
        for other in _leaves(data)
        if "data_prefix" in other and "data_prefix" in leaf
    )


def _heads(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, head) of every head that says how many classes there are."""
    for key, part in _parts(model, "model"):
        other = part.get("type") == EDGES or set(key.split(".")) & set(OTHER_NUMBERS)
        if not other and ("num_classes" in part or "num_things_classes" in part):
            yield key, part


def _number(head: Any) -> int:
    """How many classes a head has."""
    if "num_things_classes" in head:
        return head["num_things_classes"] + head.get("num_stuff_classes", 0)
    return head["num_classes"]


def _labels(head: Any) -> int:
    """How many labels a head takes: one output of a segmentor tells two."""
    one = any(part.get("use_sigmoid") for _, part in _parts(head.get("loss_decode")))
    return max(_number(head), 2) if one else _number(head)


def _check_heads(config: Config, classes: list[str], findings: Findings) -> None:
    """The numbers of classes in the model, and the weights of classes that must be as many."""
    for key, head in _heads(config.model):
        number = _number(head)
        expected = f"num_classes={len(classes)} in {key}, as metainfo.classes"
        if classes and number != len(classes) and _labels(head) != len(classes):
            findings.add(findings.config, "heads", expected, str(number), "the same number in every head")
        for name, loss in _parts(head):
            weights = loss.get("class_weight")
            if isinstance(weights, (list, tuple)) and len(weights) not in (number, number + 1):
                expected = f"{number} or, with the background, {number + 1} values in {key}{name}.class_weight"
                findings.add(findings.config, "weights", expected, str(len(weights)), "a weight for every class")
