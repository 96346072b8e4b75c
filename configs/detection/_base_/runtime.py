"""What every detector's run shares."""

default_scope = "mmdet"
custom_imports = dict(imports=["visattn.mm"], allow_failed_imports=False)
custom_hooks = [dict(type="PlainCheckpointHook")]
sync_bn = "torch"  # across the processes of a distributed run, as in the official ones; None on CPUs, which cannot
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="DetLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_level = "INFO"
load_from = None
resume = False
