#!/bin/sh
# Tells what of iSCSI this guest has, and changes nothing. Each line is a word and its fields, with
# tabs between; a field that is not there is "-". The last line is "end".
#
#   tool                                         there is an iscsiadm
#   initiator  NAME
#   session    NUMBER IQN ADDRESS PORT STATE USER
#   device     BELOW NAME MAJOR:MINOR SECTORS MAPPER-NAME MAPPER-UUID MD-LEVEL PARTITION LUN
#              of the session above; BELOW is what it lies on, and a disk has a LUN
#   mount      MAJOR:MINOR LINE             the line is one of /proc/self/mountinfo
#   swap       a name of /proc/swaps
#   record     FILE STARTUP AUTHMETHOD
#   discovery  DIRECTORY
#
# The kernel tells of sessions without iscsiadm, and no LUN is asked: it may be gone.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
tab=$(printf '\t') usual=$IFS
numbers=' ' names=' '

say() {
	IFS=$tab
	printf '%s\n' "$*"
	IFS=$usual
}

# The first line of a file, as $value.
first() {
	value=
	[ -r "$1" ] && read -r value <"$1"
	[ -n "$value" ] || value=-
}

# A device and all that lies on it: what is below, its name, its LUN.
device() {
	first "/sys/class/block/$2/dev" && number=$value
	first "/sys/class/block/$2/size" && size=$value
	first "/sys/class/block/$2/dm/name" && name=$value
	first "/sys/class/block/$2/dm/uuid" && uuid=$value
	first "/sys/class/block/$2/md/level" && level=$value
	first "/sys/class/block/$2/partition"
	say device "$1" "$2" "$number" "$size" "$name" "$uuid" "$level" "$value" "${3:--}"
	numbers="$numbers$number " names="$names$2 "
	for next in "/sys/class/block/$2/$2"*/partition "/sys/class/block/$2/holders"/*; do
		[ -e "$next" ] || continue
		next=${next%/partition}
		device "$2" "${next##*/}"
	done
}

survey() {
	command -v iscsiadm >/dev/null && say tool
	if [ -r /etc/iscsi/initiatorname.iscsi ]; then
		while read -r line; do
			case $line in InitiatorName=*) say initiator "${line#*=}" ;; esac
		done </etc/iscsi/initiatorname.iscsi
	fi

	for session in /sys/class/iscsi_session/session*; do
		[ -e "$session" ] || continue
		id=${session##*session}
		first "$session/targetname" && iqn=$value
		first "$session/state" && state=$value
		first "$session/username" && user=$value
		address=- port=-
		for connection in "/sys/class/iscsi_connection/connection$id:"*; do
			first "$connection/persistent_address" && address=$value
			first "$connection/persistent_port" && port=$value
		done
		say session "$id" "$iqn" "$address" "$port" "$state" "$user"
		for disk in "$session/device/target"*/*/block/*; do
			[ -e "$disk" ] || continue
			lun=${disk%/block/*}
			device - "${disk##*/}" "${lun##*:}"
		done
	done

	while read -r line; do
		number=${line#* * } && number=${number%% *}
		case $number in
		0:*)
			# btrfs: the number is the filesystem's own, and the source says more.
			source=${line##* - } && source=${source#* } && source=${source%% *}
			case $source in
			/dev/*) source=$(readlink -f "$source") && first "/sys/class/block/${source##*/}/dev" && number=$value ;;
			esac
			;;
		esac
		case $numbers in *" $number "*) say mount "$number" "$line" ;; esac
	done </proc/self/mountinfo
	while read -r name _; do
		case $names in *" ${name##*/} "*) say swap "${name##*/}" ;; esac
	done </proc/swaps

	for base in /etc/iscsi /var/lib/iscsi; do
		# One may be a link to the other.
		[ "$base" = /var/lib/iscsi ] && [ "$(readlink -f /etc/iscsi/nodes)" = "$(readlink -f /var/lib/iscsi/nodes)" ] && continue
		if [ -d "$base/nodes" ]; then
			find "$base/nodes" -type f | while read -r file; do
				startup=- method=-
				while read -r key _ value; do
					case $key in
					node.startup) startup=$value ;;
					node.session.auth.authmethod) method=$value ;;
					esac
				done <"$file"
				say record "${file#"$base/nodes/"}" "$startup" "$method"
			done
		fi
		for directory in "$base/send_targets"/*; do
			[ -d "$directory" ] && say discovery "${directory##*/}"
		done
	done
	say end
}

# More than an agent may answer is cut off, and has no end.
survey | head -c 500000
