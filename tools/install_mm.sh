#!/usr/bin/env bash
# Brings mmengine, mmcv with its compiled ops, mmdet and mmsegmentation into the active environment, which has torch.
# Nothing of theirs is patched. PyPI has mmcv 2.1.0, the last that mmdet 3.3.0 takes, as source only; its setup.py asks
# for C++17 where torch's headers need C++20, so the compiler is called through a wrapper that has the last word, and a
# precompiled header saves most of the time. The wheel is kept, by version of torch and Python, in
# ${VISATTN_CACHE:-~/.cache/visattn}/wheels; delete that folder to build anew.
#
#   tools/install_mm.sh            build for the CPU, and for CUDA where a GPU and nvcc are there
#   FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 tools/install_mm.sh   for CUDA without a GPU in sight
#   FORCE_CUDA=0 tools/install_mm.sh   the CPU only
set -euo pipefail

say() { printf '\n=== %s (%d s since the start)\n' "$1" "$SECONDS"; }
fail() { printf 'install_mm.sh: %s\n' "$1" >&2; exit 1; }
ask() { python -c "import torch; print($1)"; }

ask 1 >/dev/null 2>&1 || fail "expected an active environment with torch, got none; try pip install -e . in a virtual environment"
compiler=${CXX:-g++}
command -v "$compiler" >/dev/null || fail "expected a C++20 compiler, got no $compiler; try apt install g++"

if [ "${FORCE_CUDA:-}" != 0 ] && { [ "${FORCE_CUDA:-}" = 1 ] || [ "$(ask 'torch.cuda.is_available()')" = True ]; }; then
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
    if command -v "$nvcc" >/dev/null; then
        kind=cuda$(ask 'torch.version.cuda')
        [ -n "${TORCH_CUDA_ARCH_LIST:-}" ] || [ "$(ask 'torch.cuda.is_available()')" = True ] ||
            fail "expected TORCH_CUDA_ARCH_LIST for a build without a GPU in sight, got none; try 9.0 for an H100"
    else
        [ "${FORCE_CUDA:-}" != 1 ] || fail "expected nvcc for FORCE_CUDA=1, got none; try CUDA_HOME=DIR with DIR/bin/nvcc"
        echo "A GPU but no nvcc: building ops for the CPU only, so mmcv's ops will refuse CUDA tensors; try CUDA_HOME=DIR"
    fi
fi
kind=${kind:-cpu}
export FORCE_CUDA=0
[ "$kind" = cpu ] && export CUDA_VISIBLE_DEVICES="" || export FORCE_CUDA=1

wheels=${VISATTN_CACHE:-$HOME/.cache/visattn}/wheels/torch-$(ask 'torch.__version__')-$(python -c 'import sys; print(sys.implementation.cache_tag)')-$kind
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What is here stays as it is; mmcv's setup.py and mmengine import pkg_resources, which setuptools 81 drops.
python - >"$work/constraints.txt" <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "torchvision", "timm", "numpy", "triton"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
print("setuptools==80.10.2")
PYTHON
pip() { python -m pip --quiet --disable-pip-version-check "$@"; }
pip install --constraint "$work/constraints.txt" setuptools wheel ninja

if ! ls "$wheels"/mmcv-2.1.0-*.whl >/dev/null 2>&1; then
    say "building mmcv 2.1.0: ops for $kind, torch $(ask 'torch.__version__')"
    printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "$(command -v "$compiler")" >"$work/cxx"
    chmod +x "$work/cxx"
    export CXX=$work/cxx
    if [ "$kind" != cpu ]; then
        printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "$(command -v "$nvcc")" >"$work/nvcc"
        chmod +x "$work/nvcc"
        export PYTORCH_NVCC=$work/nvcc
        # torch takes the folder above nvcc's for the toolkit, where the nvcc that is found may be a script elsewhere.
        toolkit=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
        [ -n "${CUDA_HOME:-}" ] || [ ! -f "$toolkit/include/cuda_runtime.h" ] || export CUDA_HOME=$toolkit
        # Headers that a small toolkit lacks are in the packages that torch's own CUDA build came with.
        CPATH=$(python -c "
import pathlib, sysconfig
print(*pathlib.Path(sysconfig.get_path('purelib')).glob('nvidia/cu*/include'), sep=':')")${CPATH:+:$CPATH}
        export CPATH
    fi
    # gcc takes a precompiled header only if it and the sources are compiled with the same flags.
    flags="-DNDEBUG -fwrapv -g0 -O2 -w -fPIC"
    includes=$(python -c "
import sysconfig, torch.utils.cpp_extension as cpp
print(*(f'-I{path}' for path in (*cpp.include_paths(), sysconfig.get_path('include'))))")
    echo '#include <torch/types.h>' >"$work/pre.h"
    # shellcheck disable=SC2086
    "$CXX" -x c++-header $flags $includes -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext \
        "$work/pre.h" -o "$work/pre.h.gch"
    jobs=$(awk -v cores="$(nproc)" '/MemAvailable/ {fit = int($2 / 1500000); print fit < 1 ? 1 : fit < cores ? fit : cores}' /proc/meminfo)
    # pip's own cache does not know torch's version.
    CFLAGS="$flags -include $work/pre.h" MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$jobs} \
        pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$work/wheel" mmcv==2.1.0
    mkdir -p "$wheels"
    mv "$work"/wheel/mmcv-2.1.0-*.whl "$wheels/"
fi

say "installing mmcv 2.1.0 ($kind), mmengine 0.10.7, mmdet 3.3.0, mmsegmentation 1.2.2"
pip install --force-reinstall --no-deps "$wheels"/mmcv-2.1.0-*.whl
# ftfy and regex are what mmsegmentation imports without asking for them.
pip install --no-build-isolation --constraint "$work/constraints.txt" \
    mmcv==2.1.0 mmengine==0.10.7 mmdet==3.3.0 mmsegmentation==1.2.2 ftfy regex

say "checking"
python -m pip check
python -W ignore - <<'PYTHON'
try:
    import cv2  # noqa: F401
except ImportError as error:
    raise SystemExit(f"expected opencv to load, got {error}; try apt install libgl1 libglib2.0-0")
import mmdet, mmseg, torch, torchvision
from mmcv.ops import nms, roi_align

for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
    features = torch.rand(2, 3, 20, 30, device=device)
    rois = torch.tensor([[0, 1.0, 2.0, 14.5, 13.0], [1, 0.0, 3.3, 28.0, 19.0]], device=device)
    try:
        ours = roi_align(features, rois, 7, 0.5, 2, "avg", True)
    except RuntimeError as error:
        print(f"mmcv has no ops for {device}: {str(error).splitlines()[0]}")
        continue
    theirs = torchvision.ops.roi_align(features, rois, 7, 0.5, 2, True)
    torch.testing.assert_close(ours, theirs)
    boxes, scores = rois[:, 1:].repeat(3, 1), torch.rand(6, device=device)
    assert torch.equal(nms(boxes, scores, 0.5)[1], torchvision.ops.nms(boxes, scores, 0.5))
    print(f"mmcv's ops run on {device}: roi_align and nms equal torchvision's")
print(f"mmdet {mmdet.__version__}, mmsegmentation {mmseg.__version__}, torch {torch.__version__}")
PYTHON
say "done"
