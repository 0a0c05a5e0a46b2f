#!/usr/bin/env bash
# Run by the systemd in tests/lab/systemd.sh's tree: drives imaged.service as an operator does and
# writes what it sees as NAME=VALUE into /lab/facts. tests/it/systemd.rs says what is right.
# /lab/loop names a loop device of the host.
set -u
exec >/lab/log 2>&1
set -x

fact() { echo "$1=$2" >>/lab/facts; }
# Whatever it prints is in the log; its exit code is the fact.
code() {
  local name=$1
  shift
  "$@"
  fact "$name" $?
}
show() { systemctl show --property="$1" --value imaged; }

groupadd --system imaged
useradd --create-home --groups imaged alice
useradd --create-home vm
mkdir /etc/imaged
cat >/etc/imaged/imaged.toml <<'TOML'
boot_volume_dirs = ["/dev", "/home", "/tmp"]
[stores.data]
kind = "directory"
path = "/srv/images"
min_free = "1MiB"
TOML
systemctl daemon-reload
code verify systemd-analyze verify imaged.service

code start systemctl start imaged
fact state "$(show ActiveState) $(show StatusText)"
pid=$(show MainPID)
fact capabilities "$(sed -n 's/^CapBnd:[[:space:]]*//p' "/proc/$pid/status")"
imagectl host get --output json >/lab/host.json

# Volumes that belong to somebody else, in the places that a stricter unit would hide.
for volume in /home/vm/disk.raw /tmp/disk.raw; do
  head -c 4000000 /dev/urandom >"$volume"
  chown vm: "$volume"
  chmod 600 "$volume"
done
chmod 700 /home/vm
code create_home runuser -u alice -- imagectl image create --boot-volume /home/vm/disk.raw \
  --wait-for-state AVAILABLE
code create_tmp imagectl image create --boot-volume /tmp/disk.raw --wait-for-state AVAILABLE
code create_device imagectl image create --boot-volume "$(cat /lab/loop)" \
  --wait-for-state AVAILABLE
for id in $(imagectl image list --output json | sed -n 's/^ *"id": "\(.*\)",$/\1/p'); do
  code verify_image imagectl image verify --image-id "$id"
  code delete imagectl image delete --force --image-id "$id"
done

# Who holds a volume is seen whoever that is.
runuser -u vm -- sh -c 'exec sleep 1000 >>/home/vm/disk.raw' &
sleep 0.5
fact held "$(imagectl image create --boot-volume /home/vm/disk.raw 2>&1 | head -n 1)"
fact stranger "$(runuser -u vm -- imagectl host get 2>&1 | head -n 1)"

# The mounts are the host's, as they come and go.
mkdir /srv/late
mount -t tmpfs late /srv/late
fact mounted "$(grep -c /srv/late "/proc/$pid/mountinfo")"
umount /srv/late
fact unmounted "$(grep -c /srv/late "/proc/$pid/mountinfo")"

journalctl -u imaged -o json --no-pager >/lab/journal.json

kill -KILL "$pid"
for _ in $(seq 100); do
  [ "$(show NRestarts) $(show ActiveState)" != "1 active" ] || break
  sleep 0.1
done
fact killed "$(show NRestarts) $(show ActiveState)"
code after_kill imagectl host get
code stop systemctl stop imaged
fact stopped "$(show Result) $(show ExecMainStatus)"

echo 'nonsense = 1' >>/etc/imaged/imaged.toml
code start_wrong systemctl start imaged
fact wrong "$(show SubState) $(show ExecMainStatus)"
fact wrong_said "$(journalctl -u imaged -o cat --no-pager | grep nonsense)"
sed -i /nonsense/d /etc/imaged/imaged.toml
mkdir /run/systemd/system/imaged.service.d
printf '[Service]\nExecStart=\nExecStart=/usr/bin/imaged --nonsense\n' \
  >/run/systemd/system/imaged.service.d/arguments.conf
systemctl daemon-reload
code start_arguments systemctl start imaged
fact arguments "$(show SubState) $(show ExecMainStatus)"

fact exposure "$(systemd-analyze security --no-pager imaged | sed -n 's/.*exposure level.*: \([0-9.]*\) .*/\1/p')"
fact end reached
