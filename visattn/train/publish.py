"""A finished run as a repository of the Hugging Face hub, with a model card."""

from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from visattn.hub import load
from visattn.train.config import Config, recipe
from visattn.train.errors import ConfigError
from visattn.weights import first_line

USAGE = """```python
import visattn
from PIL import Image

model, transform, labels = visattn.load("{repo}")
logits = model(transform(Image.open("image.jpg"))[None])
print(labels[logits.argmax()])
```

`timm.create_model("hf-hub:{repo}", pretrained=True)` after `import visattn` gives the same model.

## Recipe

For `visattn train --config FILE`:

```yaml
{recipe}```"""


def check_access(repo: str | None) -> None:
    """Ask the hub who writes, before hours of training.

    Raises:
        ConfigError: no such name can be, no token, or no network.
    """
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except Exception as error:  # of httpx or requests, by the hub's version
        raise ConfigError(
            f"--push-to-hub: expected OWNER/NAME on the Hugging Face hub and a token that may write there, got: "
            f"{first_line(error)}; try hf auth login, or without --push-to-hub"
        ) from error


def push(folder: Path, config: Config, best: dict[str, Any]) -> str:
    """Upload weights, config.json and a card to `config.push_to_hub`; returns the address.

    Raises:
        ConfigError: the hub refuses, or is not there; the run is whole.
    """
    repo = str(config.push_to_hub)
    model, _, labels = load(folder)
    data = Path(config.data).name
    options = {k: v for k, v in recipe(config).items() if k not in ("output", "name")} | {"data": data}
    card = {
        "license": config.hub_license,
        "tags": ["image-classification", "timm", "visattn"],
        "description": f"`{config.model}` trained with [visattn](https://github.com/visattn/visattn).",
        "details": {
            "Data": f"{data}, {len(labels)} classes, {config.img_size} px",
            "Test accuracy": f"top-1 {best['top1']:.2f} %, top-5 {best['top5']:.2f} % (epoch {best['epoch']})",
        },
        "usage": USAGE.format(repo=repo, recipe=yaml.safe_dump(options, sort_keys=False)),
    }
    try:
        return str(
            timm.models.push_to_hf_hub(
                model, repo, model_config={"label_names": labels}, model_card=card, safe_serialization=True
            )
        )
    except Exception as error:
        raise ConfigError(
            f"--push-to-hub: expected to write to {repo}, got: {first_line(error)}; "
            f"try visattn train --resume {folder} --push-to-hub {repo} --hub-license {config.hub_license}"
        ) from error
