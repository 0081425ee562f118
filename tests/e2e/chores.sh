#!/bin/busybox sh
# shellcheck shell=dash
# What a clean guest may do all day, for the tests of detection:
#
#   chores SECONDS SEED MODULE
#
# Rounds of files, processes, the loopback network, a module that comes and
# goes, memory that runs short, and a CPU that is taken away and given back, in
# an order that SEED sets. Whole rounds, so that the last one may go past
# SECONDS. Prints "done ROUNDS" at the end; what fails ends it, and is named.
set -eu
chore=
trap '[ $? = 0 ] || echo "failed: $chore"' EXIT
seconds=$1
seed=$2
module=$3
name=${module##*/}
name=${name%.ko}
here=$(mktemp -d)
cd "$here"

files() {
    mkdir -p tree/a/b/c
    for number in 1 2 3 4 5 6 7 8; do
        dd if=/dev/zero of=tree/a/$number bs=4k count=$((number * 3)) 2>/dev/null
        cp tree/a/$number tree/a/b/c/
        ln -s ../$number tree/a/b/$number
    done
    find tree -type f | sort | xargs md5sum >sums
    tar -czf tree.tgz tree
    rm -r tree
    tar -xzf tree.tgz
    md5sum -c sums >/dev/null
    chmod -R go-rwx tree
    mv tree other
    du -s other >/dev/null
    rm -r other tree.tgz sums
}

processes() {
    for number in 1 2 3 4 5; do
        sh -c "exit $number" || :
        seq 1 200 | grep 7 | sort -r | wc -l >/dev/null
    done
    sleep 60 &
    ps >/dev/null
    kill $!
    wait $! 2>/dev/null || :
    cat /proc/self/status /proc/self/maps /proc/meminfo /proc/stat >/dev/null
    find /sys/kernel /proc/sys -type f -name 'o*' >/dev/null
}

network() {
    ifconfig lo 127.0.0.1 up
    mkdir www
    dd if=/dev/zero of=www/page bs=16k count=4 2>/dev/null
    httpd -f -p 127.0.0.1:8080 -h www &
    server=$!
    until wget -q -O page http://127.0.0.1:8080/page; do sleep 0.1; done
    for _ in 1 2 3; do wget -q -O page http://127.0.0.1:8080/page; done
    cmp page www/page
    ping -c 2 127.0.0.1 >/dev/null
    netstat -tn >/dev/null
    kill $server
    wait $server 2>/dev/null || :
    rm -r www page
}

modules() {
    insmod "$module"
    lsmod >/dev/null
    if [ -e "/proc/$name" ]; then
        cat "/proc/$name" "/proc/$name" >/dev/null
    fi
    cat /proc/modules /proc/mounts >/dev/null
    rmmod "$name"
}

# All that is free but 32 MiB, in a file, and read back.
memory() {
    free=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo)
    mkdir full
    mount -t tmpfs -o size=100% full full
    dd if=/dev/zero of=full/ballast bs=1M count=$((free - 32)) 2>/dev/null
    md5sum full/ballast >/dev/null
    find /proc/sys -type f >/dev/null
    umount full
    rmdir full
}

processors() {
    cpu=/sys/devices/system/cpu/cpu1/online
    echo 0 >$cpu
    seq 1 3000 | md5sum >/dev/null
    echo 1 >$cpu
}

end=$(($(cut -d. -f1 /proc/uptime) + seconds))
rounds=0
while [ "$(cut -d. -f1 /proc/uptime)" -lt $end ]; do
    for chore in $(printf '%s\n' files processes network modules memory processors |
        awk -v seed=$((seed * 1000 + rounds)) 'BEGIN { srand(seed) } { print rand(), $1 }' |
        sort -n | cut -d' ' -f2); do
        $chore
    done
    rounds=$((rounds + 1))
done
cd /
rm -r "$here"
echo "done $rounds"
