# Each of the guest's processors keeps its own queue of $DISK busy.
for cpu in 0 1; do
  fio --name=cpu$cpu --filename="/dev/$DISK" --direct=1 --ioengine=libaio --rw=randread --bs=4k --iodepth=8 --cpus_allowed=$cpu \
    --number_ios=4000 --size=16M --minimal > /tmp/fio.$cpu 2>&1 &
done
for job in $(jobs -p); do wait "$job" || { cat /tmp/fio.*; exit 1; }; done
for cpu in 0 1; do say "errors_cpu$cpu" "$(cut -d';' -f5 /tmp/fio.$cpu)"; done
for queue in /sys/block/$DISK/mq/*; do say "cpus_of_queue$(basename "$queue")" "$(cat "$queue/cpu_list")"; done
pause   # the test asks the server what each queue did while the session lasts
