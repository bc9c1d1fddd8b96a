# Functions for guest scripts. /init sources this file before the script, in the same shell.
# Lines on the channel (fd 8): "@name args" tells, "?name args" asks and is answered by one line.

# tell NAME [ARGS...]: report to the host, which waits for it with guest.expect("NAME"). Does not block.
tell() { printf '@%s\n' "$*" >&8; }

_ask() { printf '?%s\n' "$*" >&8; IFS= read -r _answer <&8; }

# await_host: block until the host says something with guest.say("line"), and print that line.
await_host() { _ask await; printf '%s\n' "$_answer"; }

# reboot: restart the guest. The script runs again from its top with BOOT one higher; QEMU and its devices live on.
reboot() { _ask reboot; command reboot -f; sleep 1000; }

# card [N]: the sysfs directory of the Nth PCI function (from 0) that is a network controller.
card() {
    _n=0
    for _f in /sys/bus/pci/devices/*; do
        case "$(cat "$_f/class")" in 0x02*) ;; *) continue ;; esac
        if [ "$_n" -eq "${1:-0}" ]; then echo "$_f"; return 0; fi
        _n=$((_n + 1))
    done
    return 1
}

# give DRIVER FUNCTION...: have this driver take PCI functions (sysfs directories) from the ones that have them.
give() {
    _driver=$1
    shift
    for _f; do
        echo "$_driver" > "$_f/driver_override"
        if [ -e "$_f/driver" ]; then echo "${_f##*/}" > "$_f/driver/unbind"; fi
        echo "${_f##*/}" > /sys/bus/pci/drivers_probe
        if [ "$(basename "$(readlink "$_f/driver")")" != "$_driver" ]; then
            echo "$_driver does not take ${_f##*/}" >&2
            return 1
        fi
    done
}

# nic [N]: the name of the Nth network interface that a PCI function has; waits up to 10 s for it to appear.
nic() {
    _t=0
    while [ "$_t" -lt 100 ]; do
        _n=0
        for _f in /sys/class/net/*; do
            case "$(readlink -f "$_f")" in */pci*) ;; *) continue ;; esac
            if [ "$_n" -eq "${1:-0}" ]; then echo "${_f##*/}"; return 0; fi
            _n=$((_n + 1))
        done
        _t=$((_t + 1))
        usleep 100000
    done
    echo "no network interface number ${1:-0} on the PCI bus" >&2
    return 1
}

# bring_up INTERFACE: set it up, and wait up to 10 s until frames leave by it: before the kernel has dealt with its link
# (net/core/link_watch.c, beside whoever sets it up) they are dropped. `ip link` waits while it does.
bring_up() {
    ip link set "$1" up
    wait_for 10 _link_is_up "$1"
}

_link_is_up() { ip link show "$1" | grep -q ' state UP '; }

# wait_for SECONDS COMMAND...: repeat the command quietly until it succeeds; fail when the seconds are over.
wait_for() {
    _end=$(($(date +%s) + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ "$(date +%s)" -ge "$_end" ]; then echo "gave up waiting for: $*" >&2; return 1; fi
        usleep 50000
    done
}
