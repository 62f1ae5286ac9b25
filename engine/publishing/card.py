"""The model card: what the weights are, how they came about, how they load, and what they are not for."""

import json

from datasets.lists.label_classes import LabelClasses
from engine.publishing.publication import Publication
from engine.segmentation.setup import Preprocessing
from models.backbones.interface import spatial_dims_of
from models.hub import WEIGHTS_NAME

NOT_RECORDED = "not recorded"
MONAI_VERSIONS = {"swin_unetr": False, "swin_unetr_v2": True}  # backbone -> use_v2
LIMITS = """\
- Research only. **Not for clinical use**: this is no medical device, and nobody has validated it for care.
- The network knows CT with the voxel size, HU window and axis order of the table. Other input gives other features, and
  no error.
- Patients, scanners and protocols that the training data lack are unknown to it. Results may differ between groups of
  patients; test it on your own data before you rely on it.
"""


def model_card(publication: Publication, name: str, data: str = "", license: str = "") -> str:
    """The README.md of a published network.

    Args:
        name: what it is called: `owner/name` on the hub, or a folder's name.
        data: what it was trained on, in the publisher's words; empty = what the run recorded.
        license: of the weights, by the hub's name (apache-2.0, cc-by-4.0, ...); empty = left out.
    """
    title = "Segmentation network for CT" if publication.is_segmenter else "Pretrained network for 3-D CT"
    parts = [
        header(publication, license),
        f"# {name.split('/')[-1]}",
        f"{title}, trained as the table says.",
        table(rows(publication, data)),
        command(publication),
        classes(publication),
        f"## Use\n\n{usage(publication, name)}",
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def header(publication: Publication, license: str) -> str:
    """The card's front matter, which the hub reads."""
    tags = ["ct", "medical-imaging", "3d", publication.description["backbone"]["name"]]
    if "method" in publication.description:
        tags += ["self-supervised", publication.description["method"]]
    lines = [f"license: {license}"] if license else []
    lines.append(f"pipeline_tag: {'image-segmentation' if publication.is_segmenter else 'image-feature-extraction'}")
    return "\n".join(["---", *lines, "library_name: pytorch", "tags:", *(f"- {tag}" for tag in tags), "---\n"])


def rows(publication: Publication, data: str) -> dict[str, str]:
    """The card's table: name -> value."""
    described, facts = publication.description, publication.facts
    known, backbone = Preprocessing.from_dict(described["preprocessing"]), described["backbone"]
    method = "finetuned for segmentation" if publication.is_segmenter else described.get("method", NOT_RECORDED)
    sides = known.spacing_mm or ()
    spacing = " x ".join(f"{side:g}" for side in sides) + " mm" if sides else "that of each file"
    if "pretrained" in facts:
        method += f", from weights by {facts['pretrained'].get('method', 'others')}"
    if "module" in described:
        method += f" ({described['module']})"
    head = " with a head on hypercolumns" if backbone.get("hypercolumns") else ""
    found = {
        "Method": method,
        "Network": f"{backbone['name']}{head}, feature size {backbone['feature_size']}, {known.spatial_dims}-D, "
        f"{publication.num_parameters / 1e6:.1f} M parameters",
        "Data": data or NOT_RECORDED,
        "Training cases": str(facts.get("num_training_cases", NOT_RECORDED)),
        "Steps": str(described.get("step", NOT_RECORDED)),
        "Voxel size (D, H, W)": spacing,
        "Intensities that become 0 to 1": known.window_text,
        "Axes of arrays": described["preprocessing"].get("axcodes", NOT_RECORDED),
        "Crop (D, H, W)": " x ".join(map(str, known.roi)) + " voxels",
        "Commit of the code": described.get("commit", NOT_RECORDED),
        "Versions": ", ".join(f"{name} {value}" for name, value in described.get("versions", {}).items()),
        "Started": facts.get("started"),
    }
    if "best_dice" in facts:
        found["Dice of the held-out cases"] = f"{facts['best_dice']:.3f} (they chose the weights)"
    return {name: value or NOT_RECORDED for name, value in found.items()}


def table(values: dict[str, str]) -> str:
    """A table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items()), ""])


def command(publication: Publication) -> str:
    """The command line and the flags of the run, folders left out."""
    if not publication.flags:
        return ""
    flags = json.dumps(publication.flags, indent=1)
    line = publication.facts.get("command") or NOT_RECORDED
    details = f"<details><summary>All flags</summary>\n\n```json\n{flags}\n```\n\n</details>\n"
    return f"## Training\n\n```\n{line}\n```\n\n{details}"


def classes(publication: Publication) -> str:
    """The labels of a segmenter."""
    if not publication.is_segmenter:
        return ""
    known = LabelClasses.from_dict(publication.description["classes"])
    listed = [f"- {value}: {name}" for value, name in zip(known.values, known.names)]
    return "\n".join(["## Labels\n", *listed, ""])


def usage(publication: Publication, name: str) -> str:
    """Commands and code that load the weights."""
    place = f"hf://{name}" if "/" in name else f"{name}/{WEIGHTS_NAME}"
    if publication.is_segmenter:
        return f"```bash\npython scripts/predict.py CT.nii.gz LABELS.nii.gz --checkpoint_file {place}\n```\n"
    text = f"""\
```bash
python scripts/finetune_segmentation.py --weights {place} --data_dir DATA --json_list LIST --output_dir RUN
```

```python
from engine.features import load_features
features = load_features("{place}")("ct.nii.gz")  # maps by stride, their affines, and .pooled()
```
"""
    backbone, roi = publication.description["backbone"], publication.description["preprocessing"]["roi"]
    if backbone["name"] in MONAI_VERSIONS:
        sizes = f"feature_size={backbone['feature_size']}, spatial_dims={spatial_dims_of(roi)}"
        text += f"""
With MONAI alone, on input as the table says:

```python
from monai.networks.nets import SwinUNETR
from safetensors.torch import load_file
model = SwinUNETR(in_channels=1, out_channels=14, {sizes}, use_v2={MONAI_VERSIONS[backbone["name"]]})
model.load_state_dict(load_file("{WEIGHTS_NAME}"), strict=False)
```
"""
    return text
