"""Grad-CAM by hand, for every family: what libraries should find."""

import torch

# Where the gradient is: all but these are looked at behind their final norm.
LAYERS = {
    "test_agent_deit": "blocks.3.norm1",
    "test_convit_va": "blocks.2.norm1",
    "test_deit_va": "blocks.3.norm1",
    "test_pvt": "stages.3.blocks.1.norm1",
    "test_resnet_ea": "layer4",
}
TOKENS = ("test_agent_deit", "test_convit_va", "test_deit_va", "test_pvt")  # of 16 x 16 pixels, and one more
CHANNELS_FIRST = (
    "test_biformer",
    "test_coatnet_va",
    "test_halonet_va",
    "test_maxvit_va",
    "test_overlock",
    "test_resnest_va",
    "test_resnet_ea",
)


def to_nchw(name, x, image):
    if name in TOKENS:
        return x[:, 1:].mT.unflatten(2, [n // 16 for n in image.shape[2:]])
    return x if name in CHANNELS_FIRST else x.permute(0, 3, 1, 2)


def grad_cam(model, image, classes):
    """Features [B, C, H, W] and maps [B, H, W] before their ReLU, of the classes [B]."""
    name, found = model.pretrained_cfg["architecture"], []
    layer = model.get_submodule(LAYERS.get(name, "norm"))
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.enable_grad():
        scores = model(image).gather(1, classes[:, None])
        found += torch.autograd.grad(scores.sum(), found)
    handle.remove()
    features, grad = (to_nchw(name, x.detach(), image) for x in found)
    return features, (features * grad.mean((2, 3), keepdim=True)).sum(1)
