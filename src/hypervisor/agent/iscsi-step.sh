#!/bin/sh
# Does one step of taking iSCSI from this guest, or of giving it back: $1. What it is done to comes
# from standard input, a line each, with tabs between its words. A step that was done is done again
# without harm. What gives back goes on where one thing fails, and fails at its end.
#
#   save      nothing                        prints all records: a tar archive
#   unmount   umount PATH                    from the top down
#             swapoff DEVICE
#             deactivate VG/LV
#             unmap MULTIPATH
#             flush DEVICE
#   logout    session NUMBER
#   forget    nothing                        all records, with what is in them
#   restore   a tar archive
#   login     target IQN ADDRESS PORT
#   mount     activate VG/LV                 from the bottom up
#             swapon IQN ADDRESS PORT LUN PARTITION
#             mount PATH TYPE OPTIONS SOURCE, or the five words of a disk
#
# Exit status 10: something is in use, and standard output tells by whom.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
tab=$(printf '\t')

# Where the records are: one of them may be a link to the other.
bases() {
	for base in /etc/iscsi /var/lib/iscsi; do
		for kind in nodes send_targets static isns fw; do
			[ -d "$base/$kind" ] && echo "$base/$kind"
		done
	done
}

# Nothing left to do is success (iscsiadm(8), EXIT STATUS): no session, one
# that exists, no record.
admin() {
	timeout -k 5 90 iscsiadm "$@" >/dev/null
	code=$?
	case $code in 0 | 2 | 15 | 21) return 0 ;; *) return "$code" ;; esac
}

# Who keeps a mount: mounts on it, and processes with a file of it; else what umount said.
users() {
	found=
	while read -r _ _ _ _ at _; do
		at=$(printf '%b' "$at")
		case $at in "$1"/*) found="$found, what is mounted on $at" ;; esac
	done </proc/self/mountinfo
	pattern=$(printf '%s' "$1" | sed 's/[][*?\\]/\\&/g')
	for process in $(find /proc/[0-9]*/cwd /proc/[0-9]*/root /proc/[0-9]*/exe /proc/[0-9]*/fd \
		/proc/[0-9]*/map_files -maxdepth 1 \( -lname "$pattern" -o -lname "$pattern/*" \) \
		2>/dev/null | cut -d / -f 3 | sort -un); do
		read -r name <"/proc/$process/comm" && found="$found, $name (pid $process)"
	done
	[ -n "$found" ] && printf '%s is kept by %s\n' "$1" "${found#, }" || printf '%s\n' "$2"
}

# The device of a disk by what does not change: target, portal, LUN, partition.
device() {
	for session in /sys/class/iscsi_session/session*; do
		[ -e "$session" ] || continue
		read -r name <"$session/targetname"
		[ "$name" = "$1" ] || continue
		for connection in "/sys/class/iscsi_connection/connection${session##*session}:"*; do
			read -r address <"$connection/persistent_address"
			read -r port <"$connection/persistent_port"
			[ "$address $port" = "$2 $3" ] || continue
			for disk in "$session/device/target"*/*:"$4"/block/*; do
				[ -e "$disk" ] || continue
				[ "$5" = - ] && echo "/dev/${disk##*/}" && return
				for part in "$disk"/*/partition; do
					[ -e "$part" ] || continue
					read -r number <"$part"
					[ "$number" = "$5" ] || continue
					part=${part%/partition}
					echo "/dev/${part##*/}"
					return
				done
			done
		done
	done
}

# Something that udev and the kernel need a moment for.
soon() {
	end=$(($(date +%s) + 30))
	until "$@" >/dev/null 2>&1; do
		[ "$(date +%s)" -lt "$end" ] || return 1
		sleep 0.1
	done
}

is_there() {
	found=$(device "$@") && [ -b "$found" ]
}

came_back() {
	soon is_there "$@" && return
	echo "disk $4, partition $5, of $1 did not come back" >&2
	return 1
}

unmount() {
	while IFS=$tab read -r what which; do
		case $what in
		umount)
			mountpoint -q "$which" || continue
			said=$(umount "$which" 2>&1) && continue
			users "$which" "$said"
			exit 10
			;;
		swapoff)
			grep -q "^/dev/${which}[[:space:]]" /proc/swaps || continue
			swapoff "/dev/$which" || exit 1
			;;
		deactivate)
			[ -e "/dev/$which" ] || continue
			lvchange -qq -an "$which" || exit 1
			;;
		unmap)
			[ -e "/dev/mapper/$which" ] || continue
			multipath -f "$which" || exit 1
			;;
		flush)
			[ -b "/dev/$which" ] || continue
			timeout -k 5 60 blockdev --flushbufs "/dev/$which" || exit 1
			;;
		esac
	done
}

forget() {
	bases | while read -r base; do
		# Overwritten where they lie, and on the disk, before their blocks are free.
		find "$base" -type f | while read -r file; do
			shred -f -n 1 -z "$file" || dd if=/dev/zero of="$file" bs="$(wc -c <"$file")" count=1 \
				conv=notrunc,fsync status=none || exit 1
		done || exit 1
		find "$base" -mindepth 1 -delete || exit 1
	done || exit 1
	sync
	fstrim /etc/iscsi 2>/dev/null
	fstrim /var/lib 2>/dev/null
	return 0
}

activate() {
	soon lvchange -qq -ay "$1" || lvchange -ay "$1"
}

swap_on() {
	came_back "$@" || return
	found=$(device "$@")
	grep -q "^${found}[[:space:]]" /proc/swaps || swapon "$found"
}

# Where, of which kind, how, what: a path, or the words of a disk.
mount_it() {
	mountpoint -q "$1" && return
	at=$1 kind=$2 options=$3
	shift 3
	source=$1
	if [ $# -gt 1 ]; then
		came_back "$@" || return
		source=$(device "$@")
	fi
	mkdir -p "$at" && mount -t "$kind" -o "$options" "$source" "$at"
}

mount_again() {
	failed=0
	while read -r line; do
		IFS=$tab
		set -f
		# shellcheck disable=SC2086 # its words
		set -- $line
		set +f
		unset IFS
		what=$1
		shift
		case $what in
		activate) activate "$@" ;;
		swapon) swap_on "$@" ;;
		mount) mount_it "$@" ;;
		esac || failed=1
	done
	return "$failed"
}

log_in() {
	failed=0
	while IFS=$tab read -r _ iqn address port; do
		case $address in *:*) address="[$address]" ;; esac
		admin -m node -T "$iqn" -p "$address:$port" -l || failed=1
	done
	return "$failed"
}

step() {
	case $1 in
	save) bases | tar -cf - -P --files-from=- ;;
	unmount) unmount ;;
	logout)
		while IFS=$tab read -r _ number; do
			[ -e "/sys/class/iscsi_session/session$number" ] || continue
			admin -m session -r "$number" -u || exit 1
		done
		;;
	forget) forget ;;
	restore) tar -xpf - -P ;;
	login) log_in ;;
	mount) mount_again ;;
	esac
}

# A step of an imaged that died may still be under way. What a step leaves running does not keep
# the lock.
exec 9>/run/imaged-iscsi.lock
flock -w 240 9 || exit 1
step "$1" 9>&-
