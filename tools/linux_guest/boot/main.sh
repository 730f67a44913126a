# First process of the guest: runs the jobs that /job/order names one after another, says how each ended, powers off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
mount -t tmpfs r /run; mount -t tmpfs t /tmp; mkdir -p /dev/pts /dev/shm
mount -t devpts d /dev/pts; mount -t tmpfs s /dev/shm
mount -t configfs c /sys/kernel/config 2>/dev/null
ln -sf /proc/self/fd /dev/fd
ip link set lo up
exec </dev/console >/dev/console 2>&1
cd /job
echo "GUEST-UP uptime=$(cut -d' ' -f1 /proc/uptime)"
worst=0
while read -r job; do
  echo "GUEST-JOB $job"
  bash "/job/$job" </dev/null; rc=$?
  echo "GUEST-JOB-RC $job=$rc"
  [ "$worst" -ne 0 ] || worst=$rc
done < /job/order
echo "GUEST-DOWN uptime=$(cut -d' ' -f1 /proc/uptime)"
echo "GUEST-RC=$worst"
sync
echo o > /proc/sysrq-trigger; sleep 5
