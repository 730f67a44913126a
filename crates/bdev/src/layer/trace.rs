//! Trace points at work: one reactor's ring. See [`crate::trace`].

use std::collections::{BTreeSet, VecDeque};

use qpair_reactor::ReactorId;

use super::Layer;
use crate::io::NO_IO;
use crate::measures::{Measures, Observer};
use crate::trace::{NAMES_MAX, NO_OP, Page, Point, Record, Why};
use crate::{ChannelId, DeviceId, Info, Io, IoId};

/// What is new to a bdev and goes to its module at once.
pub(super) const ENTERED: u8 = Point::Start.bit() | Point::Issue.bit();

/// A reactor's records.
#[derive(Default)]
pub(super) struct Tracer {
    /// Those that are on; none before there is a ring.
    points: u8,
    /// A power of two of them, or none.
    ring: Box<[Record]>,
    /// All that there ever were; the next one's number.
    written: u64,
    names: VecDeque<(u32, String)>,
}

/// By which number records name a bdev. Devices are counted from 1 and never reach the end of it.
fn number(device: DeviceId) -> u32 {
    device.0 as u32
}

fn record(point: Point, device: DeviceId, id: IoId, io: &Io, detail: u16, time_ns: u64) -> Record {
    let parent = if matches!(point, Point::Start) { io.parent() } else { NO_IO };
    Record {
        time_ns,
        io: id.pack(),
        parent,
        lba: io.lba,
        blocks: io.blocks,
        device: number(device),
        detail,
        op: io.op as u8,
        point: point as u8,
    }
}

impl Tracer {
    /// Whether any point is.
    #[inline(always)]
    pub(super) fn is_on(&self) -> bool {
        self.points != 0
    }

    #[inline]
    fn has(&self, point: Point) -> bool {
        self.points & point.bit() != 0
    }

    #[inline]
    fn put(&mut self, record: Record) {
        let place = self.written as usize & self.ring.len().wrapping_sub(1);
        if let Some(place) = self.ring.get_mut(place) {
            *place = record;
            self.written += 1;
        }
    }

    /// An I/O has to wait.
    #[inline]
    pub(super) fn wait(&mut self, device: DeviceId, id: IoId, io: &Io, why: Why, time_ns: u64) {
        if self.has(Point::Wait) {
            self.put(record(Point::Wait, device, id, io, why as u16, time_ns));
        }
    }

    /// An I/O is complete.
    #[inline]
    pub(super) fn done(&mut self, device: DeviceId, id: IoId, io: &Io, time_ns: u64) {
        if self.has(Point::Done) {
            self.put(record(Point::Done, device, id, io, io.status.bits(), time_ns));
        }
    }

    fn learn(&mut self, device: DeviceId, info: &Info) {
        let device = number(device);
        if self.names.iter().any(|(known, _)| *known == device) {
            return;
        }
        if self.names.len() == NAMES_MAX {
            self.names.pop_front();
        }
        self.names.push_back((device, info.name.clone()));
    }
}

impl Layer {
    /// These points are on from now on, once there is a ring.
    pub(crate) fn set_trace(&mut self, now_ns: u64, points: u8, ring: Option<Box<[Record]>>) {
        self.now_ns = now_ns;
        if let Some(ring) = ring {
            self.trace.ring = ring;
        }
        let points = if self.trace.ring.is_empty() { 0 } else { points };
        if points == self.trace.points {
            return;
        }
        self.trace.points = points;
        let changed = Record { blocks: u64::from(points), ..about(Point::Set, None, now_ns) };
        self.trace.put(changed);
        for index in 0..self.slots.len() {
            if let Some(slot) = &self.slots[index] {
                let wanted = slot.registry.board().of(slot.device_id);
                self.observe(ChannelId(index as u32), &wanted);
            }
        }
    }

    /// What looks at each I/O of a channel that ends.
    pub(super) fn observe(&mut self, channel: ChannelId, wanted: &Measures) {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        let counting = wanted.histogram_for(slot.observer.take().and_then(|before| before.counting));
        let traced = self.trace.is_on();
        if traced {
            self.trace.learn(slot.device_id, &slot.info);
        }
        slot.observer = (counting.is_some() || traced).then(|| Box::new(Observer { counting, traced }));
    }

    /// A batch of a channel's is at these points, as far as they are on.
    #[cold]
    #[inline(never)]
    pub(super) fn trace_batch(&mut self, channel: ChannelId, batch: &[IoId], points: u8) {
        let Some(slot) = &self.slots[channel.0 as usize] else { return };
        let (device, now_ns) = (slot.device_id, self.now_ns);
        for id in batch {
            // A stale name is for the module to find out about.
            let Some(io) = self.ios.find_mut(*id) else { continue };
            for (point, detail) in [(Point::Start, 0), (Point::Issue, 0), (Point::Done, io.status.bits())] {
                if self.trace.points & points & point.bit() != 0 {
                    self.trace.put(record(point, device, *id, io, detail, now_ns));
                }
            }
        }
    }

    /// The device has no room for an I/O that came just now.
    pub(super) fn trace_full(&mut self, channel: ChannelId, id: IoId) {
        if let Some(slot) = &self.slots[channel.0 as usize] {
            self.trace.wait(slot.device_id, id, self.ios.get(id), Why::Full, self.now_ns);
        }
    }

    /// A channel opens or closes.
    pub(super) fn trace_channel(&mut self, channel: ChannelId, point: Point) {
        if let Some(slot) = &self.slots[channel.0 as usize]
            && self.trace.has(point)
        {
            self.trace.put(about(point, Some(slot.device_id), self.now_ns));
        }
    }

    pub(crate) fn read_trace(&self, reactor: ReactorId, from: u64, most: usize) -> Page {
        let trace = &self.trace;
        let oldest = trace.written.saturating_sub(trace.ring.len() as u64);
        let from = from.min(trace.written);
        let (start, lost) = (from.max(oldest), oldest.saturating_sub(from));
        let next = trace.written.min(start + most as u64);
        let at = |number: u64| trace.ring[number as usize & (trace.ring.len() - 1)];
        let records: Vec<Record> = (start..next).map(at).collect();
        let seen: BTreeSet<u32> = records.iter().map(|record| record.device).collect();
        let names = trace.names.iter().filter(|(device, _)| seen.contains(device)).cloned().collect();
        Page { reactor, records, next, lost, names }
    }
}

/// A record of no I/O.
fn about(point: Point, device: Option<DeviceId>, time_ns: u64) -> Record {
    let device = device.map_or(0, number);
    Record { time_ns, io: NO_IO, parent: NO_IO, device, op: NO_OP, point: point as u8, ..Record::default() }
}
