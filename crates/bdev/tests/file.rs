//! Files for real: both drivers, tmpfs and a disk's file system, memory at any address, several reactors at once.

mod common {
    pub mod real;
}

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};

use common::real::{Rig, drivers, exerciser, one, wait};
use qpair_bdev::{BdevError, Device, FileBdev, Op, Status, lifecycle};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::driver::Choice;

/// A file that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(directory: &Path, bytes: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("qpair-bdev-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = directory.join(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn directories() -> Vec<PathBuf> {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    [PathBuf::from("/dev/shm"), target].into_iter().filter(|path| path.is_dir()).collect()
}

fn everywhere(test: impl Fn(&Path, Choice)) {
    for directory in directories() {
        drivers().into_iter().for_each(|choice| test(&directory, choice));
    }
}

#[test]
fn what_is_written_is_read_on_every_reactor_driver_and_file_system() {
    everywhere(|directory, choice| {
        for fallocate in [false, true] {
            let file = Scratch::new(directory, 3 << 20);
            let rig = Rig::new(choice, 2);
            let bdev = FileBdev::open("disk", &file.0, "uring", 512, false, fallocate, None).unwrap();
            rig.registry.register(Arc::new(bdev)).unwrap();
            let jobs: Vec<_> =
                (0..2).map(|reactor| rig.start(reactor, "disk", move || exerciser(reactor as u64, reactor as u64 * 20, 20, 400))).collect();
            jobs.into_iter().for_each(wait);
            rig.finish("disk");
        }
    });
}

#[test]
fn large_and_aligned_transfers_go_through() {
    everywhere(|directory, choice| {
        let file = Scratch::new(directory, 8 << 20);
        let rig = Rig::new(choice, 1);
        rig.registry.register(Arc::new(FileBdev::open("disk", &file.0, "aio", 0, false, false, None).unwrap())).unwrap();
        let block = rig.registry.list(Some("disk")).unwrap()[0].info.block_size as u64;
        let job = rig.start(0, "disk", move || {
            let memory = Region::new(Mapping::anonymous(8 << 20, Pages::Normal).unwrap());
            let mut stage = 0;
            Box::new(move |job, layer, reactor| {
                if job.ended.iter().any(|(_, _, status)| *status != Status::SUCCESS) {
                    panic!("{:?}", job.ended);
                }
                if !job.out.is_empty() {
                    return true;
                }
                stage += 1;
                if stage == 3 {
                    for megabyte in 0..8u64 {
                        let mut bytes = [0u8; 8];
                        memory.read((megabyte << 20) + 5000, &mut bytes).unwrap();
                        assert_eq!(bytes, [megabyte as u8 + 1; 8]);
                    }
                    return false;
                }
                for megabyte in 0..8u64 {
                    memory.fill(megabyte << 20, 1 << 20, if stage == 1 { megabyte as u8 + 1 } else { 0 }).unwrap();
                }
                let whole = Sge { region: memory.clone(), offset: 0, length: 8 << 20 };
                let op = if stage == 1 { Op::Write } else { Op::Read };
                job.submit(layer, reactor, stage, |io| {
                    (io.op, io.lba, io.blocks) = (op, 0, (8 << 20) / block);
                    io.list.push(whole);
                });
                true
            })
        });
        wait(job);
        rig.finish("disk");
    });
}

#[test]
fn a_file_truncated_under_us_gives_read_errors_beyond_its_end() {
    everywhere(|directory, choice| {
        let file = Scratch::new(directory, 1 << 20);
        let rig = Rig::new(choice, 1);
        rig.registry.register(Arc::new(FileBdev::open("disk", &file.0, "uring", 512, false, false, None).unwrap())).unwrap();
        std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().set_len(64 << 10).unwrap();
        assert_eq!(one(&rig, Op::Read, 0, 8), Status::SUCCESS);
        assert_eq!(one(&rig, Op::Read, 1024, 8), Status::UNRECOVERED_READ_ERROR);
        assert_eq!(one(&rig, Op::Read, 124, 8), Status::UNRECOVERED_READ_ERROR);
        rig.finish("disk");
    });
}

#[test]
fn unmap_gives_space_back_and_is_offered_only_where_it_works() {
    everywhere(|directory, choice| {
        let file = Scratch::new(directory, 1 << 20);
        std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().write_all_at(&[7; 1 << 20], 0).unwrap();
        let rig = Rig::new(choice, 1);
        let bdev = FileBdev::open("disk", &file.0, "uring", 512, false, true, None).unwrap();
        let offered = bdev.info().supported.has(Op::Unmap);
        rig.registry.register(Arc::new(bdev)).unwrap();
        assert_eq!(one(&rig, Op::Unmap, 0, 1024), if offered { Status::SUCCESS } else { Status::INVALID_OPCODE });
        assert_eq!(one(&rig, Op::WriteZeroes, 1024, 512), Status::SUCCESS);
        assert_eq!(one(&rig, Op::Flush, 0, 0), Status::SUCCESS);
        let bytes = std::fs::read(&file.0).unwrap();
        assert!(bytes[..512 << 10].iter().all(|byte| *byte == if offered { 0 } else { 7 }));
        assert!(bytes[512 << 10..768 << 10].iter().all(|byte| *byte == 0));
        assert!(bytes[768 << 10..].iter().all(|byte| *byte == 7));
        assert_eq!(bytes.len(), 1 << 20);
        rig.finish("disk");
    });
}

#[test]
fn without_fallocate_zeros_are_written_and_unmap_is_refused() {
    let file = Scratch::new(&directories()[0], 1 << 20);
    let rig = Rig::new(Choice::Epoll, 1);
    rig.registry.register(Arc::new(FileBdev::open("disk", &file.0, "uring", 512, false, false, None).unwrap())).unwrap();
    assert_eq!(one(&rig, Op::Unmap, 0, 8), Status::INVALID_OPCODE);
    assert_eq!(one(&rig, Op::Write, 0, 8), Status::SUCCESS);
    assert_eq!(one(&rig, Op::WriteZeroes, 0, 2048), Status::SUCCESS);
    assert!(std::fs::read(&file.0).unwrap().iter().all(|byte| *byte == 0));
    rig.finish("disk");
}

#[test]
fn a_readonly_file_refuses_writes() {
    let file = Scratch::new(&directories()[0], 1 << 20);
    let rig = Rig::new(Choice::Epoll, 1);
    rig.registry.register(Arc::new(FileBdev::open("disk", &file.0, "uring", 512, true, true, None).unwrap())).unwrap();
    assert_eq!(one(&rig, Op::Read, 0, 8), Status::SUCCESS);
    for op in [Op::Write, Op::WriteZeroes, Op::Unmap] {
        assert_eq!(one(&rig, op, 0, 8), Status::NAMESPACE_WRITE_PROTECTED, "{op:?}");
    }
    rig.finish("disk");
}

#[test]
fn a_character_device_is_refused() {
    let error = FileBdev::open("disk", "/dev/full", "uring", 512, false, false, None).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "Invalid argument: filename /dev/full: a regular file or a block device");
}

#[test]
fn rescan_takes_the_size_that_the_file_has_by_now() {
    let file = Scratch::new(&directories()[0], (1 << 20) + 100);
    let rig = Rig::new(Choice::Epoll, 1);
    rig.registry.register(Arc::new(FileBdev::open("disk", &file.0, "uring", 512, false, false, None).unwrap())).unwrap();
    let blocks = || rig.registry.list(Some("disk")).unwrap()[0].info.num_blocks;
    assert_eq!(blocks(), 2048, "the tail of less than a block is not used");
    let rescan = || {
        let (send, receive) = mpsc::channel();
        lifecycle::rescan(&rig.registry, "disk", Box::new(move |outcome| send.send(outcome).unwrap()));
        receive.recv().unwrap()
    };
    for bytes in [2u64 << 20, 4096] {
        std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().set_len(bytes).unwrap();
        assert_eq!(rescan().unwrap(), bytes / 512);
        assert_eq!(blocks(), bytes / 512);
    }
    assert_eq!(one(&rig, Op::Read, 8, 8), Status::LBA_OUT_OF_RANGE);
    let (send, receive) = mpsc::channel();
    lifecycle::resize(&rig.registry, "disk", 9, Box::new(move |outcome| send.send(outcome.map_err(|error| error.to_string())).unwrap()));
    assert_eq!(receive.recv().unwrap(), Err("Invalid argument: num_blocks 9: at most 8, the file's size".to_owned()));
    std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().set_len(0).unwrap();
    assert!(matches!(rescan(), Err(BdevError::Invalid { field: "num_blocks", .. })));
    rig.finish("disk");
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let directory = &directories()[0];
    let file = Scratch::new(directory, 100);
    let open =
        |path: &Path, module, block_size| FileBdev::open("disk", path, module, block_size, false, false, None).map(drop).unwrap_err();
    assert_eq!(open(&file.0, "nvme", 512).to_string(), "Invalid argument: module nvme: uring or aio");
    assert_eq!(open(&file.0, "aio", 513).to_string(), "Invalid argument: block_size 513: a power of two from 512 to 65536");
    assert!(open(&file.0, "aio", 512).to_string().starts_with("Invalid argument: num_blocks 0: 1 to "));
    let missing = open(&directory.join("qpair-no-such-file"), "aio", 512);
    assert_eq!(missing.errno(), 2);
    assert!(missing.to_string().contains("qpair-no-such-file"), "{missing}");
    assert!(open(directory, "aio", 512).to_string().ends_with("a regular file or a block device"));
}

#[test]
fn o_direct_is_used_where_the_disk_takes_it() {
    let file = Scratch::new(&PathBuf::from(env!("CARGO_TARGET_TMPDIR")), 1 << 20);
    let bdev = FileBdev::open("disk", &file.0, "uring", 0, false, false, None).unwrap();
    let open = |flags| std::fs::OpenOptions::new().read(true).custom_flags(flags).open(&file.0).is_ok();
    assert_eq!(bdev.is_direct(), open(0o40000) && !is_memory(&file.0), "{}", file.0.display());
    let shm = Scratch::new(&directories()[0], 1 << 20);
    let bdev = FileBdev::open("shm", &shm.0, "uring", 0, false, false, None).unwrap();
    assert!(!bdev.is_direct() || !is_memory(&shm.0));
    assert_eq!(bdev.info().module, "uring");
}

fn is_memory(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts
        .lines()
        .filter(|line| path.starts_with(line.split(' ').nth(1).unwrap()))
        .max_by_key(|line| line.split(' ').nth(1).unwrap().len());
    mount.is_some_and(|line| ["tmpfs", "ramfs", "overlay"].contains(&line.split(' ').nth(2).unwrap()))
}
