#!/usr/bin/env bash
# Everything that needs a GPU, from a fresh checkout, in one call of less than ten minutes:
#
#     benchmarks/gpu_check.sh OUT_DIR
#
# Tests, sanitizers and benchmarks run one after the other, each within its own time limit and
# without stopping the others. OUT_DIR receives summary.json (rewritten after each step), log.txt,
# doctor.txt, tests.xml and the benchmarks' JSON: at most 8 files. The status is 1 if tests or
# sanitizers failed, 2 if there is no GPU; benchmarks that fail or miss a bar are in the summary.
#
#   RNNT_OP_CHECK_DEVICE=cpu    try this script without a GPU: GPU tests skip, toy sizes
#   RNNT_OP_CHECK_INSTALL=link  do not install the package; put a tree of links on PYTHONPATH
#   RNNT_OP_CHECK_SECONDS       time for everything; default 570
#   RNNT_OP_LENGTHS             LibriSpeech lengths, an .npy file of [n, 2]
#   WHEELS                      folder of wheels from which missing Python packages are installed
#   PYTHON                      interpreter; default python3
set -uo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
device=${RNNT_OP_CHECK_DEVICE:-cuda}
budget=${RNNT_OP_CHECK_SECONDS:-570}
started=$SECONDS
tree=$repo
failed=0
useful="pytest expecttest hypothesis numpy tqdm tyro"

export PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export RNNT_OP_CACHE_DIR=$work/cache
if [ -z "${RNNT_OP_LENGTHS:-}" ] && [ -f "$repo/../shared/data/librispeech_lengths.npy" ]; then
  export RNNT_OP_LENGTHS=$repo/../shared/data/librispeech_lengths.npy
fi
: >"$out/log.txt"
: >"$work/steps.tsv"

# record NAME STATUS SECONDS LIMIT DETAIL
record() {
  printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$work/steps.tsv"
  printf '%-12s %-10s %7s s  %s\n' "$1" "$2" "$3" "$5"
  "$python" - "$out" "$work/steps.tsv" "$device" "$repo" <<'PY'
import json, pathlib, subprocess, sys, xml.etree.ElementTree as xml
from datetime import datetime, timezone

out, steps, device, repo = sys.argv[1:]
keys = ("name", "status", "seconds", "limit", "detail")
rows = [dict(zip(keys, line.split("\t"))) for line in pathlib.Path(steps).read_text().splitlines()]
for row in rows:
    row["seconds"], row["limit"] = float(row["seconds"]), int(row["limit"])
tests, report = None, pathlib.Path(out, "tests.xml")
if report.exists() and any(row["name"] == "tests" for row in rows):
    suites = list(xml.parse(report).getroot().iter("testsuite"))
    tests = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
commit = subprocess.run(["git", "-C", repo, "rev-parse", "HEAD"], capture_output=True, text=True)
summary = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "device": device,
    "commit": commit.stdout.strip() or None,
    "seconds": round(sum(row["seconds"] for row in rows), 1),
    "tests": tests,
    "steps": rows,
}
pathlib.Path(out, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
PY
}

# step NAME LIMIT COMMAND...: runs it in the tree; sets `code`
step() {
  local name=$1 limit=$2 left=$((budget - (SECONDS - started))) begin status detail=""
  shift 2
  if [ "$left" -lt 10 ]; then
    code=124
    record "$name" "timed out" 0 "$limit" "no time was left for it"
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  begin=$(date +%s.%N)
  (cd "$tree" && exec timeout -k 5 "$limit" "$@") >"$work/step.log" 2>&1
  code=$?
  case $code in
    0) status=passed ;;
    124 | 137) status="timed out" ;;
    *) status=failed ;;
  esac
  if [ $code -ne 0 ] || [ "$name" = tests ]; then
    detail=$(grep -v '^[[:space:]]*$' "$work/step.log" | tail -n 1 | tr '\t\r' '  ' | cut -c 1-300)
  fi
  { printf '\n== %s: %s\n\n' "$name" "$status"; cat "$work/step.log"; } >>"$out/log.txt"
  record "$name" "$status" "$(echo "$(date +%s.%N) $begin" | awk '{printf "%.1f", $1 - $2}')" \
    "$limit" "$detail"
}

skip() { record "$1" skipped 0 0 "$2"; }

missing_packages() {
  "$python" - "$@" <<'PY'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PY
}

# Whether the package that Python finds anywhere is this checkout, with all its parts.
is_installed() {
  (cd / && "$python" -c '
import sys, rnnt_op, rnnt_op.csrc, rnnt_op.torch_library_registration
sys.exit(not rnnt_op.__file__.startswith(sys.argv[1]))' "$1") >/dev/null 2>&1
}

# The package as it is when installed, in links: two of its parts lie elsewhere in the checkout.
link_tree() {
  local version entry
  tree=$work/tree
  mkdir -p "$tree/rnnt_op"
  for entry in "$repo"/*; do
    case ${entry##*/} in
      rnnt_op | rnnt_op.egg-info | csrc | torch_library_registration) ;;
      *) ln -s "$entry" "$tree/" ;;
    esac
  done
  for entry in "$repo"/rnnt_op/* "$repo/csrc" "$repo/torch_library_registration"; do
    ln -s "$entry" "$tree/rnnt_op/"
  done
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repo/pyproject.toml")
  mkdir "$tree/rnnt_op-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: rnnt-op\nVersion: %s\n' "$version" \
    >"$tree/rnnt_op-$version.dist-info/METADATA"
  export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH}
}

if [ "$device" != cpu ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU here; RNNT_OP_CHECK_DEVICE=cpu tries this script without one" >&2
  exit 2
fi

# shellcheck disable=SC2086
missing=$(missing_packages $useful)
if [ -n "$missing" ] && [ -n "${WHEELS:-}" ]; then
  # One by one: what is there is installed, whatever else is not.
  # shellcheck disable=SC2016,SC2086
  step wheels 60 bash -c 'status=0
    for package in "$@"; do
      "$0" -m pip install -q --no-index --find-links "$WHEELS" "$package" || status=1
    done
    exit $status' "$python" $missing
  # shellcheck disable=SC2086
  missing=$(missing_packages $useful)
fi
if [ -n "$missing" ]; then
  echo "missing: $missing (tests that import them are left out; WHEELS or '.[test,bench]' has them)"
fi

if [ "${RNNT_OP_CHECK_INSTALL:-}" != link ] && ! is_installed "$repo"; then
  step install 40 "$python" -m pip install -q --no-deps --no-build-isolation -e .
fi
if [ "${RNNT_OP_CHECK_INSTALL:-}" = link ] || ! is_installed "$repo"; then
  link_tree
  if ! is_installed "$tree"; then
    record package failed 0 0 "neither an installation nor links make rnnt_op importable"
    exit 1
  fi
  echo "rnnt_op from links in $tree"
fi

step doctor 30 "$python" -P -m rnnt_op.doctor
cp "$work/step.log" "$out/doctor.txt"

pytest=("$python" -P -m pytest -q -m gpu -p no:cacheprovider)
# Files that need a package which is not here; a missing part of this project is an error.
ignored=$(cd "$tree" && timeout 60 "${pytest[@]}" --collect-only 2>/dev/null |
  awk '/ERROR collecting tests\// { file = $4 }
    /^E +ModuleNotFoundError/ && !/rnnt_op/ { print "--ignore=" file }' | sort -u)
[ -n "$ignored" ] && echo "left out:" ${ignored//--ignore=/}
parallel=()
if [ "$device" != cpu ] && [ -z "$(missing_packages xdist)" ]; then parallel=(-n 4); fi
# shellcheck disable=SC2086
step tests 150 "${pytest[@]}" "${parallel[@]}" -k "not compute_sanitizer" $ignored \
  --junitxml "$out/tests.xml"
[ $code -ne 0 ] && failed=1

for tool in memcheck racecheck; do
  if [ "$device" = cpu ]; then
    skip $tool "no GPU"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip $tool "no compute-sanitizer"
  else
    step $tool 40 "${pytest[@]}" tests/kernels/test_gpu.py -k "compute_sanitizer and $tool"
    [ $code -ne 0 ] && failed=1
  fi
done

repeats=()
[ "$device" = cpu ] && repeats=(--repeats 1)
step speed 120 "$python" benchmarks/speed_cuda.py --device "$device" --out "$out" "${repeats[@]}"
# In float32 inputs and gradients alone take 6.3 GB; that result is in the log.
size=
[ "$device" = cpu ] && size=', "batch": 4, "frames": 30, "labels": 9, "vocab_size": 40, "joint_dim": 24'
step headline 40 "$python" -P -m rnnt_op.tools.study.headline "{\"device\": \"$device\", \"repeats\": 2$size}" "$out"
step headline32 40 "$python" -P -m rnnt_op.tools.study.headline \
  "{\"device\": \"$device\", \"dtype\": \"float32\", \"limit_gb\": 8, \"repeats\": 2$size}"
step first_call 50 "$python" benchmarks/first_call.py --device "$device" --out "$out" "${repeats[@]}"
step profile 40 "$python" benchmarks/profile_cuda.py --device "$device" --out "$out"

exit $failed
