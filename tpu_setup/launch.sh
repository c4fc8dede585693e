#!/usr/bin/env bash
# Starts experiments/train.py on all hosts of a slice, as a service that outlives the connection.
#
# A SIGTERM (preemption, delete.sh) reaches the training process alone, which then saves and ends. Starting again with
# the same --workdir continues the run. Output goes to DIRECTORY/train.log on each host; follow.sh shows it.
# Paths of the training's arguments are relative to DIRECTORY/source; data installed by install.sh is ../data.
#
# Needed:
#   --name NAME --project PROJECT --zone ZONE
#   --workdir WORKDIR         of the run; with more than one host, or to be resumed elsewhere: gs://BUCKET/DIRECTORY
#   -- CONFIG ARGUMENT...     what train.py gets, beside --workdir and --multihost
# Options:
#   --directory DIRECTORY     where install.sh has put the code (default sora)
#   --internal-ips            reach the hosts by their internal addresses
#   --config FILE             settings as in config.env.example; flags and SORA_* variables come first
#   --dry-run                 print the gcloud commands, run nothing
#
# Examples:
#   tpu_setup/launch.sh --name sora --project my-project --zone us-west4-a --workdir gs://my-bucket/runs/emoji \
#       -- sora_emoji --data.path ../data --data.batch-size 8 --data.num-shards 8
#   SORA_CONFIG=sora.env tpu_setup/launch.sh --dry-run \
#       -- sora_emoji --data.path ../data --data.batch-size 8 --data.num-shards 8
set -euo pipefail
source "$(dirname "$0")/settings.sh"

read_settings "name project zone workdir directory internal-ips rest" "directory=sora" "$@"
require name project zone workdir
training_arguments

# In a file, so that neither systemd nor another shell rewrites a $ or a % in an argument.
job="cd source && exec ../venv/bin/python -u experiments/train.py $(quote "${REST[@]}" --workdir "$SORA_WORKDIR" --multihost)"
# mixed: SIGTERM goes to the training alone, not to its data workers, which it needs for its last step.
on_hosts all "set -e
cd $(quote "$SORA_DIRECTORY")
if systemctl is-active --quiet $SERVICE; then
  echo \"\$(hostname): a training is running already; delete.sh or 'sudo systemctl stop $SERVICE' ends it\" >&2
  exit 1
fi
printf '%s\\n' $(quote "$job") >job.sh
touch train.log
sudo systemctl reset-failed $SERVICE 2>/dev/null || true
sudo systemd-run --quiet --unit=$SERVICE --uid=\"\$(id -un)\" --working-directory=\"\$PWD\" \\
  --property=KillMode=mixed --property=TimeoutStopSec=300 --property=After=network-online.target \\
  --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \\
  --property=StandardOutput=\"append:\$PWD/train.log\" --property=StandardError=\"append:\$PWD/train.log\" \\
  bash job.sh
echo \"\$(hostname): started\""
