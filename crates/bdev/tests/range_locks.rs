//! Range locks of several devices on one reactor.

mod common {
    pub mod real;
}

use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::real::{Rig, drivers, one, wait};
use qpair_bdev::null::Null;
use qpair_bdev::ranges::{self, Keep, RangeLock};
use qpair_bdev::{DeviceId, Op, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};

fn locked(rig: &Rig, device: DeviceId) -> RangeLock {
    let (send, receive) = mpsc::channel();
    ranges::lock(&rig.registry, device, 0, 8, Keep::Writers, move |lock| drop(send.send(lock)));
    receive.recv_timeout(Duration::from_secs(10)).unwrap().expect("the device stays")
}

/// Each device numbers its locks for itself, so the two here have the same number.
#[test]
fn the_end_of_one_devices_lock_leaves_that_of_another_to_channels_that_are_opened_later() {
    let rig = Rig::new(drivers()[0], 1);
    let [disk, other] = ["disk", "other"].map(|name| rig.registry.register(Arc::new(Null::new(name, 512, 64, None, 0))).unwrap());
    let (lock, others) = (locked(&rig, disk), locked(&rig, other));
    drop(others);
    let (ended, end) = mpsc::channel();
    let job = rig.start(0, "disk", move || {
        let memory = Region::new(Mapping::anonymous(512, Pages::Normal).unwrap());
        let mut begun = false;
        Box::new(move |job, layer, reactor| {
            job.ended.iter().for_each(|(_, _, status)| ended.send(*status).unwrap());
            if !std::mem::replace(&mut begun, true) {
                job.submit(layer, reactor, 0, |io| {
                    (io.op, io.lba, io.blocks) = (Op::Write, 0, 1);
                    io.list.push(Sge { region: memory.clone(), offset: 0, length: 512 });
                });
            }
            false
        })
    });
    assert_eq!(one(&rig, Op::Read, 0, 1), Status::SUCCESS, "reads are let in");
    assert!(end.recv_timeout(Duration::from_millis(100)).is_err(), "a write went past the lock");
    drop(lock);
    assert_eq!(end.recv_timeout(Duration::from_secs(10)), Ok(Status::SUCCESS));
    wait(job);
    rig.finish("disk");
}
