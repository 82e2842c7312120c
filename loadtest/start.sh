#!/bin/sh
# Starts a program of this image: start.sh PROGRAM [ARGUMENTS]. Root becomes whoever owns the folder of the records, so
# that they are theirs, and keeps one right if it has it: to ask Linux to be run before other processes (CAP_SYS_NICE).
# Without that a busy machine delays the client, which then measures itself.
set -eu
[ "$(id -u)" = 0 ] || exec "$@"
become="setpriv --reuid $(stat -c %u results) --regid $(stat -c %g results) --clear-groups"
keep="--inh-caps -all,+sys_nice --ambient-caps -all,+sys_nice"
$become $keep true 2>/dev/null || keep="--inh-caps -all"
exec $become $keep "$@"
