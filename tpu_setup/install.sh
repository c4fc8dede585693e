#!/usr/bin/env bash
# Installs this checkout on all hosts of a slice, each with an environment of its own, and checks that JAX sees the chips.
#
# What is committed is installed, not what has only been edited. Running it again replaces the code and keeps the
# environment, the data and the log. Stop the training first: the check needs the chips.
#
# Needed:
#   --name NAME --project PROJECT --zone ZONE
# Options:
#   --revision REVISION       commit, branch or tag of this checkout (default HEAD)
#   --directory DIRECTORY     on the hosts, relative to the home directory (default sora)
#   --python VERSION          of the environment, 3.11 or newer (default 3.12); uv fetches it
#   --data gs://BUCKET/DIR    prepared data set to copy to every host, as DIRECTORY/data
#   --internal-ips            reach the hosts by their internal addresses
#   --config FILE             settings as in config.env.example; flags and SORA_* variables come first
#   --dry-run                 print the commands, run nothing
#
# Examples:
#   tpu_setup/install.sh --name sora --project my-project --zone us-west4-a --data gs://my-bucket/fluent_emoji
#   SORA_CONFIG=sora.env tpu_setup/install.sh --revision v0.1.0 --dry-run
set -euo pipefail
source "$(dirname "$0")/settings.sh"

read_settings "name project zone revision directory python data internal-ips" \
  "revision=HEAD directory=sora python=3.12" "$@"
require name project zone
[[ -z ${SORA_DATA-} || $SORA_DATA == gs://?* ]] || unusable "--data must be gs://BUCKET/DIRECTORY, got '$SORA_DATA'"
root=$(dirname "$HERE")
git -C "$root" rev-parse --quiet --verify "$SORA_REVISION^{commit}" >/dev/null ||
  unusable "--revision: this checkout has no commit '$SORA_REVISION'"

if dry_run; then
  archive=/tmp/sora_jax.tar.gz
else
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  archive=$temporary/sora_jax.tar.gz
  [[ -z $(git -C "$root" status --porcelain) ]] || say "uncommitted changes are left out: $SORA_REVISION is installed"
fi
run git -C "$root" archive --format=tar.gz "--output=$archive" "$SORA_REVISION"

place
flags=()
[[ ${SORA_INTERNAL_IPS-} != 1 ]] || flags=(--internal-ip)
run gcloud compute tpus tpu-vm scp "$archive" "$SORA_NAME:sora_jax.tar.gz" "${PLACE[@]}" \
  ${flags[@]+"${flags[@]}"} --worker=all

# uv brings the Python asked for, whatever the hosts' image has. etils[epath-gcs] reads and writes gs:// paths.
commands="set -e
mkdir -p $(quote "$SORA_DIRECTORY")
cd $(quote "$SORA_DIRECTORY")
rm -rf source installed
mkdir source
tar -xzf ~/sora_jax.tar.gz -C source
export PATH=\"\$HOME/.local/bin:\$PATH\"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv --quiet --allow-existing --python $(quote "$SORA_PYTHON") venv
uv pip install --quiet --python venv/bin/python -e 'source[tpu]' 'etils[epath-gcs]'"
if [[ -n ${SORA_DATA-} ]]; then
  commands+="
mkdir -p data
gcloud storage rsync --recursive $(quote "$SORA_DATA") data"
fi
on_hosts all "$commands"

check='import jax; jax.distributed.initialize(); print(f"host {jax.process_index()} of {jax.process_count()}: '
check+='{jax.local_device_count()} of {jax.device_count()} chips, {jax.devices()[0].device_kind}")'
on_hosts all "cd $(quote "$SORA_DIRECTORY") && venv/bin/python -c $(quote "$check") && touch installed"
