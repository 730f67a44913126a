//! Reactors on threads of their own, and front ends on them.
#![allow(dead_code)]

use std::collections::HashMap;
use std::sync::{Arc, mpsc};

use qpair_bdev::{ChannelId, IoFlags, IoId, Layer, Op, QueueId, Registry, Status, lifecycle};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::driver::Choice;
use qpair_reactor::sim::Rng;
use qpair_reactor::thread::{ReactorThread, spawn};
use qpair_reactor::{Config, Poller, Reactor, ReactorId};

pub fn drivers() -> Vec<Choice> {
    let uring = qpair_reactor::driver::open(Choice::IoUring).is_ok();
    assert!(uring || std::env::var("CI").as_deref() != Ok("true"), "io_uring is not to be had in CI");
    if uring {
        vec![Choice::IoUring, Choice::Epoll]
    } else {
        eprintln!("SKIPPED: io_uring is not to be had here");
        vec![Choice::Epoll]
    }
}

pub type Step = Box<dyn FnMut(&mut Job, &mut Layer, &mut Reactor) -> bool>;

/// A front end that runs `step` after each completion until it says that all is done.
pub struct Job {
    pub queue: QueueId,
    pub channel: ChannelId,
    pub out: HashMap<u64, IoId>,
    pub ended: Vec<(IoId, u64, Status)>,
    pub step: Option<Step>,
    pub done: mpsc::Sender<()>,
}

impl Job {
    pub fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, tag: u64, fill: impl FnOnce(&mut qpair_bdev::Io)) {
        let id = layer.take().unwrap();
        fill(layer.io_mut(id));
        layer.io_mut(id).push(self.queue, tag);
        self.out.insert(id.pack(), id);
        layer.submit(reactor, self.channel, &[id]);
        layer.unplug(reactor);
    }
}

impl Poller for Job {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let Some(mut step) = self.step.take() else { return 0 };
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        for id in &reaped {
            let frame = layer.retrieve(*id);
            let status = layer.io(*id).status;
            self.out.remove(&id.pack()).expect("it was out");
            self.ended.push((*id, frame.tag, status));
        }
        let more = step(self, &mut layer, reactor);
        self.ended.drain(..).for_each(|(id, ..)| layer.give_back(id));
        if more || !self.out.is_empty() {
            self.step = Some(step);
        } else {
            layer.close_channel(reactor, self.channel);
            layer.remove_queue(self.queue);
            self.done.send(()).unwrap();
        }
        reaped.len()
    }
}

pub struct Rig {
    pub threads: Vec<ReactorThread>,
    pub registry: Arc<Registry>,
}

impl Rig {
    pub fn new(choice: Choice, reactors: u32) -> Self {
        let threads: Vec<_> = (0..reactors).map(|id| spawn(ReactorId(id), Config::default(), choice, false).unwrap()).collect();
        let registry = Registry::new(threads.iter().map(|thread| thread.handle().clone()).collect());
        Self { threads, registry }
    }

    /// Runs a job on a reactor; `make` is called there.
    pub fn start(&self, reactor: usize, name: &str, make: impl FnOnce() -> Step + Send + 'static) -> mpsc::Receiver<()> {
        let (done, wait) = mpsc::channel();
        let (registry, name) = (self.registry.clone(), name.to_owned());
        self.threads[reactor].handle().call(move |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let descriptor = registry.open(&name, true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer).unwrap();
            let poller = reactor.reserve_poller("job");
            let queue = layer.add_queue(reactor.waker(poller).unwrap());
            let job = Job { queue, channel, out: HashMap::new(), ended: Vec::new(), step: Some(make()), done };
            reactor.install_poller(poller, Box::new(job));
        });
        wait
    }

    pub fn finish(self, name: &str) {
        self.remove(name);
    }

    pub fn remove(&self, name: &str) {
        let (reply, wait) = mpsc::channel();
        lifecycle::unregister(&self.registry, name, 0, Box::new(move |outcome| reply.send(outcome).unwrap()));
        wait.recv_timeout(std::time::Duration::from_secs(20)).unwrap().unwrap();
    }
}

pub fn wait(done: mpsc::Receiver<()>) {
    done.recv_timeout(std::time::Duration::from_secs(30)).expect("the job ends");
}

pub fn cut(list: &mut qpair_memory::SgList, memory: &Region, mut offset: u64, length: u64, rng: &mut Rng, aligned: bool) {
    let end = offset + length;
    while offset < end {
        let step = if aligned { 4096 } else { rng.between(1, 9000) }.min(end - offset);
        list.push(Sge { region: memory.clone(), offset, length: step as u32 });
        offset += step;
    }
}

/// Random writes (some FUA) and reads in cells of 64 KiB of its own; verifies each read; flushes at the end.
pub fn exerciser(seed: u64, first_cell: u64, cells: u64, rounds: u32) -> Step {
    const CELL: u64 = 64 << 10;
    let memory = Region::new(Mapping::anonymous((cells * CELL + 4096) as usize, Pages::Normal).unwrap());
    let mut rng = Rng::new(seed);
    let mut content = vec![vec![0u8; (CELL / 512) as usize]; cells as usize];
    let mut pending: HashMap<u64, (Op, u64, u64, u8)> = HashMap::new();
    let (mut left, mut flushed) = (rounds, false);
    Box::new(move |job, layer, reactor| {
        for (id, cell, status) in std::mem::take(&mut job.ended) {
            assert_eq!(status, Status::SUCCESS, "{:?}", layer.io(id).op);
            layer.give_back(id);
            let Some((op, first, blocks, fill)) = pending.remove(&cell) else { continue };
            let known = &mut content[cell as usize][first as usize..(first + blocks) as usize];
            match op {
                Op::Write => known.fill(fill),
                Op::WriteZeroes => known.fill(0),
                Op::Read => {
                    for (block, fill) in known.iter().enumerate() {
                        let mut bytes = [0u8; 512];
                        memory.read(cell * CELL + 13 + (block as u64) * 512, &mut bytes).unwrap();
                        assert!(bytes.iter().all(|byte| byte == fill), "cell {cell} block {block} is {:?}, not {fill}", &bytes[..4]);
                    }
                }
                _ => {}
            }
        }
        while left > 0 && pending.len() < cells as usize {
            let cell = (0..cells).find(|cell| !pending.contains_key(cell)).unwrap();
            let op = *rng.pick(&[Op::Read, Op::Read, Op::Write, Op::Write, Op::WriteZeroes]);
            let first = rng.below(CELL / 512);
            let blocks = rng.between(1, CELL / 512 - first);
            let fill = rng.between(1, 255) as u8;
            let aligned = rng.chance(1, 2);
            // Address 13 off: nothing is aligned, unless the list is made so on purpose.
            if op == Op::Write {
                memory.fill(cell * CELL + 13, blocks * 512, fill).unwrap();
            }
            let (memory, rng) = (&memory, &mut rng);
            job.submit(layer, reactor, cell, |io| {
                (io.op, io.lba, io.blocks) = (op, (first_cell + cell) * (CELL / 512) + first, blocks);
                if op != Op::WriteZeroes {
                    cut(&mut io.list, memory, cell * CELL + 13, blocks * 512, rng, aligned);
                }
                if rng.chance(1, 8) {
                    io.flags |= IoFlags::FUA;
                }
            });
            pending.insert(cell, (op, first, blocks, fill));
            left -= 1;
        }
        if left == 0 && pending.is_empty() && !flushed {
            flushed = true;
            job.submit(layer, reactor, u64::MAX, |io| (io.op, io.lba, io.blocks) = (Op::Flush, 0, 0));
        }
        left > 0 || !flushed
    })
}

/// One I/O of 4 KiB on block 0.. of "disk" and its status.
pub fn one(rig: &Rig, op: Op, lba: u64, blocks: u64) -> Status {
    let (send, receive) = mpsc::channel();
    let job = rig.start(0, "disk", move || {
        let memory = Region::new(Mapping::anonymous((blocks * 512).max(512) as usize, Pages::Normal).unwrap());
        let mut begun = false;
        Box::new(move |job, layer, reactor| {
            job.ended.iter().for_each(|(_, _, status)| send.send(*status).unwrap());
            if !begun {
                begun = true;
                let data =
                    matches!(op, Op::Read | Op::Write).then(|| Sge { region: memory.clone(), offset: 0, length: (blocks * 512) as u32 });
                job.submit(layer, reactor, 0, |io| {
                    (io.op, io.lba, io.blocks) = (op, lba, blocks);
                    io.list.extend(data);
                });
            }
            false
        })
    });
    wait(job);
    receive.recv().unwrap()
}
