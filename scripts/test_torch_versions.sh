#!/usr/bin/env bash
# Runs a quick selection of the tests in fresh environments: with the oldest torch that pyproject.toml allows, with one in
# the middle, and with the newest that pip offers. Ends with a line for each, and with 1 if any failed.
#
#   scripts/test_torch_versions.sh                 all three
#   scripts/test_torch_versions.sh 2.14.1 newest   these
set -uo pipefail
cd "$(dirname "$0")/.."

selection=(
    tests/ops/test_registration.py tests/ops/test_dispatch.py tests/ops/test_neighborhood.py tests/ops/test_linear.py
    tests/layers tests/models/test_contract.py tests/models/test_frames.py tests/models/test_nat.py
    tests/models/test_families.py::test_golden
    tests/train/test_train_run.py tests/train/test_train_resume.py tests/train/test_train_metrics.py
    tests/train/test_train_checkpoint.py
)
oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\).*/\1/p' pyproject.toml)
[ "$#" -gt 0 ] || set -- "$oldest" 2.14.1 newest

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for version; do
    printf '\n=== torch %s\n' "$version"
    wanted=torch
    [ "$version" = newest ] || wanted="torch==$version"
    python3 -m venv "$work/env" && "$work/env/bin/pip" install --quiet "$wanted" torchvision -e ".[train,test]" &&
        "$work/env/bin/python" -m pytest -q "${selection[@]}" 2>&1 | tee "$work/log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    found=$("$work/env/bin/python" -c 'import timm, torch; print(f"torch {torch.__version__}, timm {timm.__version__}")')
    echo "${found:-torch $version}: $(tail -n 1 "$work/log" 2>/dev/null)" >>"$work/summary"
    rm -rf "$work/env" "$work/log"
done
printf '\n=== summary\n'
cat "$work/summary"
exit "$failed"
