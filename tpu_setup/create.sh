#!/usr/bin/env bash
# Creates a TPU VM or slice, or asks for one in the queue.
#
# Needed:
#   --name NAME               of the slice (and of its queued resource)
#   --project PROJECT --zone ZONE
#   --accelerator-type TYPE   as `gcloud compute tpus accelerator-types list` names it
#   --runtime-version VERSION of the hosts' software, `gcloud compute tpus versions list`
# Options:
#   --provisioning HOW        on-demand (default), spot, queued or queued-spot
#   --valid-until DURATION    queued: give the request up after this time, for example 6h
#   --wait                    queued: return when the slice is there, not when the request is in the queue
#   --poll-seconds SECONDS    between two looks at the queue (default 60)
#   --service-account EMAIL   whose rights the hosts have; it needs those on the bucket of the run
#   --network NAME --subnetwork NAME
#   --internal-ips            hosts without external addresses (they need Cloud NAT to install packages)
#   --config FILE             settings as in config.env.example; flags and SORA_* variables come first
#   --dry-run                 print the gcloud commands, run nothing
#
# Examples:
#   tpu_setup/create.sh --name sora --project my-project --zone us-west4-a \
#       --accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --provisioning spot --dry-run
#   SORA_CONFIG=sora.env tpu_setup/create.sh --provisioning queued-spot --valid-until 6h --wait
set -euo pipefail
source "$(dirname "$0")/settings.sh"

wait_for_slice() { # until the request has been filled
  local state
  while true; do
    if ! state=$(request_state); then
      say "cannot ask for the state of $SORA_NAME; trying again"
    else
      case $state in
        ACTIVE) return 0 ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING | "")
          fail "the request $SORA_NAME is ${state:-gone}; delete it (delete.sh) and create it again"
          ;;
        *) say "$SORA_NAME: $state" ;;
      esac
    fi
    sleep "$SORA_POLL_SECONDS"
  done
}

read_settings "name project zone accelerator-type runtime-version provisioning valid-until wait poll-seconds
  service-account network subnetwork internal-ips" "provisioning=on-demand poll-seconds=60" "$@"
require name project zone accelerator-type runtime-version
one_of provisioning on-demand spot queued queued-spot
count poll-seconds 1

flags=("--accelerator-type=$SORA_ACCELERATOR_TYPE")
[[ $SORA_PROVISIONING != *spot ]] || flags+=(--spot)
[[ -z ${SORA_SERVICE_ACCOUNT-} ]] || flags+=("--service-account=$SORA_SERVICE_ACCOUNT")
[[ -z ${SORA_NETWORK-} ]] || flags+=("--network=$SORA_NETWORK")
[[ -z ${SORA_SUBNETWORK-} ]] || flags+=("--subnetwork=$SORA_SUBNETWORK")
[[ ${SORA_INTERNAL_IPS-} != 1 ]] || flags+=(--internal-ips)
place

if queued; then
  [[ -z ${SORA_VALID_UNTIL-} ]] || flags+=("--valid-until-duration=$SORA_VALID_UNTIL")
  run gcloud compute tpus queued-resources create "$SORA_NAME" "--node-id=$SORA_NAME" "${PLACE[@]}" \
    "--runtime-version=$SORA_RUNTIME_VERSION" "${flags[@]}"
  if [[ ${SORA_WAIT-} == 1 ]]; then
    if dry_run; then
      echo "# every $SORA_POLL_SECONDS s, until it is ACTIVE:"
      request_state
    else
      wait_for_slice
    fi
  fi
else
  run gcloud compute tpus tpu-vm create "$SORA_NAME" "${PLACE[@]}" "--version=$SORA_RUNTIME_VERSION" "${flags[@]}"
fi
