"""What every segmentor's run shares."""

default_scope = "mmseg"
custom_imports = dict(imports=["visattn.mm", "mmdet.models"], allow_failed_imports=False)  # mmdet has Mask2Former's
custom_hooks = [dict(type="PlainCheckpointHook")]
sync_bn = "torch"  # across the processes of a distributed run, as in the official ones; None on CPUs, which cannot
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
tta_model = dict(type="SegTTAModel")
