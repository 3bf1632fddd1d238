#!/bin/bash
# A Slurm cluster of two nodes on this machine, for trying the job files (Debian: apt-get install slurm-wlm munge).
#     examples/slurm/local.sh start FOLDER       # then: export SLURM_CONF=FOLDER/slurm.conf
#     examples/slurm/local.sh start-node FOLDER n2
#     examples/slurm/local.sh kill-node FOLDER n2
#     examples/slurm/local.sh stop FOLDER
# Keys, logs and states are in FOLDER; nothing outside it is written. Run it as root, or as a user that owns FOLDER.
set -euo pipefail
action=$1
folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf PATH=$PATH:/usr/sbin

start_node() { slurmd -N "$1" -f "$SLURM_CONF" -L "$folder/$1.log"; }

# As if the machine lost power: the node's daemon, the daemons of its job steps, then what these started.
kill_node() {
    pkill -9 -f "slurmd -N $1 -f $SLURM_CONF" || true
    local tasks
    tasks=$(grep -lzx "SLURMD_NODENAME=$1" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3 || true)
    for task in $tasks; do
        parent=$(ps -o ppid= "$task" || true)
        if [ "$(ps -o comm= "${parent:-0}")" = slurmstepd ]; then kill -9 "$parent"; fi
    done
    for task in $tasks; do kill -9 "$task" 2>/dev/null || true; done
}

case $action in
start)
    mkdir -p "$folder/state"
    chmod 700 "$folder"
    dd if=/dev/urandom of="$folder/munge.key" bs=1 count=1024 status=none
    chmod 400 "$folder/munge.key"
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldPort=26817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=10
KillWait=5
RebootProgram=/bin/true
NodeName=n[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[26901-26902] CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
        --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
    slurmctld -c -f "$SLURM_CONF" -L "$folder/slurmctld.log"
    start_node n1
    start_node n2
    for _ in $(seq 30); do [ "$(sinfo -h -o %D -t idle)" = 2 ] && break || sleep 1; done
    sinfo
    echo "export SLURM_CONF=$SLURM_CONF"
    ;;
start-node) start_node "$3" ;;
kill-node) kill_node "$3" ;;
stop)
    kill_node n1
    kill_node n2
    for daemon in slurmctld munge; do kill "$(cat "$folder/$daemon.pid")" || true; done
    ;;
*) echo "unknown action: $action (start, start-node, kill-node, stop)" >&2 && exit 2 ;;
esac
