//! Both ends of a ring: the load generator and the initiator on core 1, the vhost target on core 0, one process and no socket between.
//!
//! `cargo run --release -p qpair-perf --example pair -- [null|malloc] [depth] [milliseconds] [queue size] [packed]` prints one line of JSON.
//! It is for comparing two builds in seconds; what users get is measured over the socket, by `make bench`.

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc;

use qpair_bdev::{Device, Registry, malloc::Malloc, null::Null};
use qpair_perf::{Spec, run};
use qpair_reactor::driver::Choice;
use qpair_reactor::event::Event;
use qpair_reactor::{Config, ReactorId, thread};
use qpair_vhost::{Addresses, Command, MemoryRow, Options, Source, Target};
use qpair_virtio::{QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::Features;

/// 512 MiB in blocks of 4 KiB.
const BLOCKS: u64 = (512 << 20) / 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let module = arguments.next().unwrap_or_else(|| "null".to_owned());
    let depth: u32 = arguments.next().map_or(Ok(1), |text| text.parse())?;
    let duration_ms: u64 = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let size: u32 = arguments.next().map_or(Ok(512), |text| text.parse())?;
    let packed = arguments.next().as_deref() == Some("packed");
    let device: Arc<dyn Device> = match module.as_str() {
        "null" => Arc::new(Null::new("bench", 4096, BLOCKS, None, 0)),
        "malloc" => Arc::new(Malloc::new("bench", 4096, BLOCKS, None, 0, 0)?),
        other => return Err(format!("module {other}: null or malloc").into()),
    };
    let server = thread::spawn(ReactorId(0), Config::default(), Choice::Auto, true)?;
    let client = thread::spawn(ReactorId(1), Config::default(), Choice::Auto, true)?;
    let disks = Registry::new(vec![server.handle().clone()]);
    disks.register(device)?;
    let target = Target::new(disks, |failure| eprintln!("{}", failure.broken));
    target.create("disk", "bench", vec![server.handle().clone()], Options { packed_ring: true, ..Options::default() })?;

    let layout = VirtioLayout::new(1, size, 65536)?;
    let mut features = Features::VERSION_1 | Features::INDIRECT_DESC | Features::RING_EVENT_IDX;
    features.set(Features::RING_PACKED, packed);
    let queue = QueueSetup { size: size as u16, kick: Event::new()?, call: Event::new()? };
    serve(&target, &layout, &queue, features)?;
    let mut config = vec![0u8; 60];
    config[..8].copy_from_slice(&(BLOCKS * 8).to_le_bytes());
    let registry = Registry::new(vec![client.handle().clone()]);
    registry.register(Arc::new(VirtioBlk::new("pair", layout, features.bits(), &config, vec![queue])?))?;

    if module == "malloc" {
        // Pages that were never written are all one page of zeros: that would measure the cache.
        run(&registry, Spec { pattern: "write".parse()?, max_ios: BLOCKS, io_bytes: 4096, ..Spec::new("pair") })?;
    }
    let report = run(&registry, Spec { depth, duration_ms, ..Spec::new("pair") })?;
    println!(
        r#"{{"module":"{module}","packed":{packed},"depth":{depth},"iops":{:.0},"mean_ns":{:.1},"p50_ns":{},"p99_ns":{},"errors":{}}}"#,
        report.iops(),
        report.mean_ns,
        report.percentile_ns(50.0),
        report.percentile_ns(99.0),
        report.errors
    );
    Ok(())
}

/// Puts the queue into the target's hands, as a front end does.
fn serve(target: &Arc<Target>, layout: &Arc<VirtioLayout>, queue: &QueueSetup, features: Features) -> Result<(), Box<dyn Error>> {
    let session = target.open("disk")?;
    let mapping = layout.mapping().clone();
    let row = MemoryRow {
        guest_address: 0,
        length: mapping.len() as u64,
        user_address: mapping.address() as u64,
        offset: 0,
        source: Source::Mapping(mapping),
    };
    let places = layout.queue_addresses(0).ok_or("no queue 0")?;
    let addresses = Addresses { desc: places.desc, avail: places.avail, used: places.used, log: None };
    let commands = [
        Command::SetFeatures(features.bits()),
        Command::SetMemTable(vec![row]),
        Command::SetVringNum { queue: 0, size: u32::from(queue.size) },
        Command::SetVringAddr { queue: 0, addresses },
        Command::SetVringCall { queue: 0, call: Some(queue.call.twin()?) },
        Command::SetVringKick { queue: 0, kick: Some(queue.kick.twin()?) },
    ];
    for command in commands {
        let (send, receive) = mpsc::channel();
        target.command(session, command, Box::new(move |outcome| drop(send.send(outcome.map(drop)))));
        receive.recv()??;
    }
    Ok(())
}
