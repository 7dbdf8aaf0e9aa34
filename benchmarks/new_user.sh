#!/bin/bash
# What a new user does, with a clock, in an empty home: clone, install, the example, the README's
# ten lines twice, a search, a job by curl, its page, its pruned model, and what that writes.
#
#     benchmarks/new_user.sh [FOLDER]      # which must not exist; free port 8765
set -euo pipefail
checkout=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
place=${1:-$(mktemp -d)/new-user}
mkdir "$place"
export HOME="$place/home" XDG_CACHE_HOME="$place/home/.cache" PHO_API_URL=http://localhost:8765
mkdir "$HOME"
unset PYTHONPATH VIRTUAL_ENV
began=$SECONDS
after() { echo "== $((SECONDS - began)) s: $*"; }

cd "$place"
git clone --quiet "$checkout" pho
python3 -m venv venv
. venv/bin/activate
(cd pho && pip install --quiet '.[all]')
after "installed"
pho example --small
after "the example"
sed -n '/^## Ten lines/,/^## /{/^```python/,/^```/p}' pho/README.md | grep -v '^```' > ten.py
python ten.py
after "ten lines"
python ten.py
after "ten lines again"
pho search example/small-llama --pattern 0.5 --text example/calibration.jsonl \
    --confirm-text example/confirmation.jsonl --out config.json
after "a search"
pho serve --port 8765 > serve.log 2>&1 &
trap 'kill %1' EXIT
until curl --silent --fail --output /dev/null $PHO_API_URL/readyz; do sleep 0.5; done
after "a service"
job=$(curl --silent $PHO_API_URL/v1/jobs -H 'content-type: application/json' -d '{
    "model": "example/small-llama", "pattern": "0.7", "prune": true,
    "calibration": {"text": "example/calibration.jsonl", "samples": 64},
    "confirm": {"text": "example/confirmation.jsonl"}}' | sed 's/{"id":"\([^"]*\)".*/\1/')
pho watch "$job"
after "a job"
curl --silent --fail --output page.html $PHO_API_URL/jobs/"$job"
pho pull "$job" --out downloaded
after "its page and its model"
pho generate downloaded --beside example/small-llama --text example/report.jsonl
after "what it writes"
