#!/usr/bin/env bash
# A real S3 server on 127.0.0.1: Ceph's RADOS Gateway over one monitor and one OSD, all of it in one directory.
#
#   object-store.sh install | start [DIR] | stop [DIR] | kill9 [DIR] | wipe [DIR] | env [DIR]
#
#   install   get the packages with apt-get (needs root)
#   start     make the store in DIR if there is none, and serve it
#   stop      end the server, keep the objects; kill9 does it with SIGKILL, as a crash would
#   wipe      end the server and delete DIR
#   env       print the variables for S3 clients: eval "$(object-store.sh env)"
#
# DIR is ${TMPDIR:-/tmp}/geoseg-object-store unless given. GEOSEG_S3_PORT (17480), GEOSEG_S3_MON_PORT (13300), AK and SK
# set the ports, the key and the secret; all but the first are kept for the life of the store.
# Exit status: 0 done, 1 failed or refused, 2 wrong usage, 3 the packages are missing.
set -euo pipefail
umask 077

readonly TIME_LIMIT_S=90
readonly STOP_LIMIT_S=20
readonly PACKAGES=(ceph-mon ceph-osd radosgw)
readonly PROGRAMS=(ceph ceph-mon ceph-osd ceph-authtool monmaptool rados radosgw radosgw-admin)

say() { printf 'object-store: %s\n' "$*"; }

refuse() {
  local status=$1
  shift
  say "$@" >&2
  exit "$status"
}

has_packages() {
  local program
  for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || return 1; done
}

is_store() { [[ -f $dir/lock ]]; }

# The settings are written when everything else has been made.
is_complete() { [[ -f $dir/settings ]]; }

is_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# --- processes: $dir/pids has a line "NAME PID START_TIME" for each one that was launched

# Prints the start time of a living process; by it a reused pid is never mistaken for ours. A zombie is dead once its
# other threads are gone, for until then its ports are open.
start_time_of() {
  local stat fields
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  read -ra fields <<<"${stat##*) }"
  local state=${fields[0]} num_threads=${fields[17]} start_time=${fields[19]}
  [[ $state != Z ]] || ((num_threads > 1)) || return 1
  echo "$start_time"
}

living() {
  local name pid started now
  [[ -f $dir/pids ]] || return 0
  while read -r name pid started; do
    if now=$(start_time_of "$pid") && [[ $now == "$started" ]]; then echo "$name $pid"; fi
  done <"$dir/pids"
}

launch() {
  local name=$1
  shift
  setsid "$@" >>"$dir/log/$name.log" 2>&1 </dev/null 9>&- &
  echo "$name $! $(start_time_of $!)" >>"$dir/pids"
  disown
}

signal_all() {
  local name pid
  while read -r name pid; do kill -s "$1" "$pid" 2>/dev/null || true; done < <(living)
}

end_all() {
  local give_up=$((SECONDS + STOP_LIMIT_S))
  signal_all "$1"
  while [[ -n $(living) ]]; do
    if ((SECONDS >= give_up)); then signal_all KILL; fi
    sleep 0.1
  done
  rm -f "$dir/pids"
}

# --- steps of a start, each bounded by the time limit

fail_start() { refuse 1 "$1; the log is $2"; }

run() {
  local purpose=$1 left=$((TIME_LIMIT_S - SECONDS))
  shift
  timeout --foreground "$((left > 1 ? left : 1))" "$@" >>"$dir/log/commands.log" 2>&1 ||
    fail_start "could not $purpose" "$dir/log/commands.log"
}

wait_until() {
  local name=$1 log=$dir/log/$1.log
  shift
  until "$@"; do
    [[ $(living) == *"$name "* ]] || fail_start "$name ended while it was starting" "$log"
    ((SECONDS < TIME_LIMIT_S)) || fail_start "$name was not ready $TIME_LIMIT_S seconds after the start began" "$log"
    sleep 0.1
  done
}

query() { timeout --foreground 10 "$1" --conf "$dir/ceph.conf" "${@:2}" 2>>"$dir/log/commands.log"; }

osd_is_up() { [[ $(query ceph osd stat) == *" 1 up"* ]]; }

write_conf() {
  cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $(</proc/sys/kernel/random/uuid)
mon_host = v2:127.0.0.1:$mon_port/0
public_network = 127.0.0.0/8
ms_bind_msgr1 = false
keyring = $dir/keyring
# radosgw cannot log in to a cluster that has authentication switched off.
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
# The path of a Unix socket may have 107 characters; DIR may be longer.
admin_socket =
pid_file =
run_dir = $dir
debug_rocksdb = 1/5
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0

[mon]
mon_data = $dir/mon
mon_data_avail_crit = 1
log_to_file = false
log_to_stderr = true

[osd]
osd_data = $dir/osd
osd_objectstore = bluestore
# A sparse file: the size is a limit, not what it takes.
bluestore_block_size = 21474836480
osd_memory_target = 1073741824
log_to_file = false
log_to_stderr = true

[client.rgw.s3]
rgw_data = $dir/rgw
rgw_thread_pool_size = 64
rgw_enable_ops_log = false
rgw_enable_usage_log = false
debug_rgw = 0/0
log_to_file = false
log_to_stderr = true
CONF
}

write_keyring() {
  run "make the keyring" ceph-authtool "$dir/keyring" --create-keyring --gen-key -n mon. --cap mon 'allow *'
  run "make the admin's key" ceph-authtool "$dir/keyring" --gen-key -n client.admin \
    --cap mon 'allow *' --cap osd 'allow *'
  run "make the OSD's key" ceph-authtool "$dir/keyring" --gen-key -n osd.0 \
    --cap mon 'allow profile osd' --cap osd 'allow *'
  run "make the gateway's key" ceph-authtool "$dir/keyring" --gen-key -n client.rgw.s3 \
    --cap mon 'allow rw' --cap osd 'allow rwx'
}

make_monitor() {
  local fsid
  fsid=$(sed -n 's/^fsid = //p' "$dir/ceph.conf")
  run "make the monitor's map" monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon_port]" "$dir/monmap"
  run "make the monitor" ceph-mon --conf "$dir/ceph.conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
}

make_osd() {
  local uuid
  uuid=$(</proc/sys/kernel/random/uuid)
  run "register the OSD" ceph --conf "$dir/ceph.conf" osd new "$uuid" 0
  run "make the OSD" ceph-osd --conf "$dir/ceph.conf" -i 0 --mkfs --osd-uuid "$uuid"
  run "place the OSD" ceph --conf "$dir/ceph.conf" osd crush add osd.0 1.0 root=default host=localhost
}

# --- settings: the key, the secret, the gateway's port and the monitor's, a line each

read_settings() {
  key=${AK:-geoseg} secret=${SK:-geoseg-local-only} port=${GEOSEG_S3_PORT:-17480} mon_port=${GEOSEG_S3_MON_PORT:-13300}
  if is_complete; then
    { read -r key && read -r secret && read -r port && read -r mon_port; } <"$dir/settings"
  fi
}

write_settings() { printf '%s\n' "$key" "$secret" "$port" "$mon_port" >"$dir/settings"; }

# --- commands

install_packages() {
  if has_packages; then
    say "${PACKAGES[*]} are already installed"
    return
  fi
  command -v apt-get >/dev/null ||
    refuse 3 "this machine has no apt-get; install the Ceph programs by hand: ${PROGRAMS[*]}"
  ((EUID == 0)) || refuse 1 "installing packages needs root; run it with sudo"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q
  apt-get install -y -q --no-install-recommends "${PACKAGES[@]}"
}

start_store() {
  has_packages || refuse 3 "the packages ${PACKAGES[*]} are not installed; run: $0 install"
  if [[ -e $dir ]] && ! is_store && [[ -n $(ls -A "$dir") ]]; then
    refuse 1 "$dir has other files in it; name a directory that is new or empty"
  fi
  mkdir -p "$dir/log"
  exec 9>"$dir/lock"
  flock -w "$TIME_LIMIT_S" 9 || refuse 1 "another start is still at work in $dir after $TIME_LIMIT_S seconds"

  read_settings
  if [[ "${AK:-$key} ${SK:-$secret} ${GEOSEG_S3_MON_PORT:-$mon_port}" != "$key $secret $mon_port" ]]; then
    refuse 1 "the store in $dir was made with another AK, SK or GEOSEG_S3_MON_PORT; unset them, or wipe the store"
  fi
  local wanted_port=${GEOSEG_S3_PORT:-$port}
  if (($(living | wc -l) == 3)); then
    ((wanted_port == port)) || refuse 1 "the store in $dir already runs on port $port, not $wanted_port; stop it first"
    say "already running at http://127.0.0.1:$port"
    return
  fi
  end_all TERM
  port=$wanted_port
  if is_open "$port"; then
    refuse 1 "port $port of 127.0.0.1 is taken by another program; choose one with GEOSEG_S3_PORT"
  fi
  if is_open "$mon_port"; then
    refuse 1 "port $mon_port of 127.0.0.1 is taken by another program; choose one with GEOSEG_S3_MON_PORT"
  fi

  trap 'end_all KILL' EXIT
  if is_complete; then serve_again; else serve_first; fi
  write_settings
  trap - EXIT
  say "ready at http://127.0.0.1:$port (region us-east-1, path style); the variables for clients: $0 env $dir"
}

serve_first() {
  # What an interrupted first start left behind is of no use.
  rm -rf "${dir:?}"/{mon,osd,rgw,monmap,keyring,ceph.conf}
  mkdir "$dir"/{mon,osd,rgw}
  write_conf
  write_keyring
  make_monitor
  serve_monitor
  make_osd
  serve_osd
  run "make the S3 user" radosgw-admin --conf "$dir/ceph.conf" user create --uid=geoseg --display-name=geoseg \
    --access-key="$key" --secret-key="$secret"
  serve_gateway
}

serve_again() {
  serve_monitor
  # Until it is told, the monitor takes the OSD that ended for up, and requests wait ten seconds for it.
  run "mark the OSD down" ceph --conf "$dir/ceph.conf" osd down 0
  serve_osd
  forget_dead_gateway
  serve_gateway
}

# A gateway that crashed has left its watches on the cluster, and the next new bucket waits 30 s for it to answer them.
forget_dead_gateway() {
  local address
  for address in $(query rados --pool default.rgw.control listwatchers notify.0 | sed -n 's/^watcher=\([^ ]*\).*/\1/p'); do
    run "forget the crashed gateway" ceph --conf "$dir/ceph.conf" osd blocklist add "$address"
  done
}

serve_monitor() {
  launch monitor ceph-mon --conf "$dir/ceph.conf" -i a -f
  wait_until monitor is_open "$mon_port"
}

serve_osd() {
  launch osd ceph-osd --conf "$dir/ceph.conf" -i 0 -f
  wait_until osd osd_is_up
}

# Without tcp_nodelay Nagle's algorithm meets the client's delayed ACK, and every small GET takes about 40 ms more.
serve_gateway() {
  launch gateway radosgw --conf "$dir/ceph.conf" -n client.rgw.s3 -f \
    --rgw_frontends="beast endpoint=127.0.0.1:$port tcp_nodelay=1"
  wait_until gateway is_open "$port"
}

end_store() {
  if [[ -z $(living) ]]; then
    say "not running in $dir"
  else
    end_all "$1"
    say "stopped; the objects are kept in $dir"
  fi
}

wipe_store() {
  if [[ ! -e $dir ]]; then
    say "nothing to wipe, there is no $dir"
    return
  fi
  is_store || refuse 1 "$dir is not an object store made by this script; delete it by hand if you want it gone"
  end_all KILL
  rm -rf "${dir:?}"
  say "wiped $dir"
}

print_environment() {
  read_settings
  printf 'export %s=%q\n' AWS_ACCESS_KEY_ID "$key" AWS_SECRET_ACCESS_KEY "$secret" AWS_REGION us-east-1 \
    AWS_DEFAULT_REGION us-east-1 AWS_ENDPOINT_URL "http://127.0.0.1:$port"
}

(($# >= 1 && $# <= 2)) || refuse 2 "usage: $0 install | start [DIR] | stop [DIR] | kill9 [DIR] | wipe [DIR] | env [DIR]"
dir=$(realpath -m -- "${2:-${TMPDIR:-/tmp}/geoseg-object-store}")
if [[ -e $dir && ! -O $dir ]]; then refuse 1 "$dir belongs to another user; name a directory of your own"; fi

case $1 in
  install) install_packages ;;
  start) start_store ;;
  stop) end_store TERM ;;
  kill9) end_store KILL ;;
  wipe) wipe_store ;;
  env) print_environment ;;
  *) refuse 2 "there is no command '$1'; it is one of install, start, stop, kill9, wipe, env" ;;
esac
