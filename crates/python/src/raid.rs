//! RAID bdevs for Python, and their superblocks as dicts.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use qpair_raid::{ArrayInfo, Level, Options, Spec};
use qpair_wire::raid_superblock::{self, Base, BaseState, Header, LENGTH_MAX, NAME_BYTES};
use uuid::Uuid;

use crate::bdev::parse_uuid;
use crate::engine::Engine;
use crate::values::{Failure, Number, Value};

const LEVELS: [(&str, Level); 4] = [("raid0", Level::RAID0), ("raid1", Level::RAID1), ("raid5f", Level::RAID5F), ("concat", Level::CONCAT)];
const STATES: [(&str, BaseState); 4] =
    [("missing", BaseState::MISSING), ("configured", BaseState::CONFIGURED), ("failed", BaseState::FAILED), ("spare", BaseState::SPARE)];

fn level_of(name: &str) -> Result<Level, Failure> {
    let found = LEVELS.iter().find(|(known, _)| *known == name);
    found.map(|(_, level)| *level).ok_or_else(|| Failure::invalid("raid_level", name, "raid0, raid1 or concat"))
}

fn level_name(level: Level) -> &'static str {
    LEVELS.iter().find(|(_, known)| *known == level).map_or("", |(name, _)| name)
}

fn show<'py>(py: Python<'py>, array: &ArrayInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &array.name)?;
    dict.set_item("uuid", array.uuid.to_string())?;
    dict.set_item("strip_size_kb", array.strip_kb)?;
    dict.set_item("state", array.phase.name())?;
    dict.set_item("raid_level", level_name(array.level))?;
    dict.set_item("superblock", array.superblock)?;
    dict.set_item("num_base_bdevs", array.members.len())?;
    dict.set_item("num_base_bdevs_discovered", array.discovered)?;
    dict.set_item("num_base_bdevs_operational", array.operational)?;
    dict.set_item("process", array.process.as_ref().map(|(target, done, total)| (target, *done, *total)))?;
    let mut members = Vec::with_capacity(array.members.len());
    for member in &array.members {
        let dict = PyDict::new(py);
        dict.set_item("name", &member.name)?;
        dict.set_item("uuid", member.uuid.to_string())?;
        dict.set_item("is_configured", member.is_configured)?;
        dict.set_item("data_offset", member.data_offset)?;
        dict.set_item("data_size", member.data_size)?;
        members.push(dict);
    }
    dict.set_item("base_bdevs", members)?;
    Ok(dict)
}

fn superblock_dict<'py>(py: Python<'py>, header: &Header, bases: &[Base]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("version", (header.version_major.get(), header.version_minor.get()))?;
    dict.set_item("flags", header.flags.get())?;
    dict.set_item("uuid", Uuid::from_bytes(header.uuid).to_string())?;
    dict.set_item("name", header.name())?;
    dict.set_item("raid_size", header.raid_size.get())?;
    dict.set_item("block_size", header.block_size.get())?;
    dict.set_item("raid_level", level_name(header.level()))?;
    dict.set_item("strip_size", header.strip_size.get())?;
    dict.set_item("state", header.state.get())?;
    dict.set_item("seq_number", header.seq_number.get())?;
    dict.set_item("num_base_bdevs", header.num_base_bdevs)?;
    let mut members = Vec::with_capacity(bases.len());
    for base in bases {
        let dict = PyDict::new(py);
        dict.set_item("uuid", Uuid::from_bytes(base.uuid).to_string())?;
        dict.set_item("data_offset", base.data_offset.get())?;
        dict.set_item("data_size", base.data_size.get())?;
        dict.set_item("state", STATES.iter().find(|(_, known)| *known == base.state()).map(|(name, _)| *name))?;
        dict.set_item("flags", base.flags.get())?;
        dict.set_item("slot", base.slot)?;
        members.push(dict);
    }
    dict.set_item("base_bdevs", PyTuple::new(py, members)?)?;
    Ok(dict)
}

fn refused(error: raid_superblock::Error) -> Failure {
    Failure::new(libc::EINVAL, format!("Invalid argument: superblock {error}"))
}

fn field<'py, T: for<'a> FromPyObject<'a, 'py, Error = PyErr>>(dict: &Bound<'py, PyDict>, name: &str) -> PyResult<T> {
    dict.get_item(name)?.ok_or_else(|| Failure::invalid(name, "None", "given").into()).and_then(|value| value.extract())
}

fn number(dict: &Bound<'_, PyDict>, name: &str, most: u64) -> PyResult<u64> {
    Ok(field::<Number>(dict, name)?.within(name, 0..=most)?)
}

fn uuid_bytes(dict: &Bound<'_, PyDict>) -> PyResult<[u8; 16]> {
    let text: String = field(dict, "uuid")?;
    Ok(parse_uuid(Some(&text))?.unwrap_or_default().into_bytes())
}

fn base_of(dict: &Bound<'_, PyDict>) -> PyResult<Base> {
    let state: String = field(dict, "state")?;
    let known = STATES.iter().find(|(name, _)| *name == state).map(|(_, state)| state.0);
    let state = known.ok_or_else(|| Failure::invalid("state", &state, "missing, configured, failed or spare"))?;
    Ok(Base {
        uuid: uuid_bytes(dict)?,
        data_offset: number(dict, "data_offset", u64::MAX)?.into(),
        data_size: number(dict, "data_size", u64::MAX)?.into(),
        state: state.into(),
        flags: (number(dict, "flags", u32::MAX.into())? as u32).into(),
        slot: number(dict, "slot", u8::MAX.into())? as u8,
        ..Base::default()
    })
}

fn header_of(dict: &Bound<'_, PyDict>) -> PyResult<Header> {
    let (name, level): (String, String) = (field(dict, "name")?, field(dict, "raid_level")?);
    if name.len() >= NAME_BYTES {
        return Err(Failure::invalid("name", &name, format_args!("1 to {} bytes", NAME_BYTES - 1)).into());
    }
    let short = |name| number(dict, name, u32::MAX.into()).map(|value| (value as u32).into());
    let mut header = Header {
        flags: short("flags")?,
        uuid: uuid_bytes(dict)?,
        raid_size: number(dict, "raid_size", u64::MAX)?.into(),
        block_size: short("block_size")?,
        level: level_of(&level)?.0.into(),
        strip_size: short("strip_size")?,
        state: short("state")?,
        seq_number: number(dict, "seq_number", u64::MAX)?.into(),
        num_base_bdevs: number(dict, "num_base_bdevs", u8::MAX.into())? as u8,
        ..Header::default()
    };
    header.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(header)
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (name, *, level, base_bdevs, strip_size_kb=Number::of(0), uuid=None, superblock=false),
        text_signature = "($self, name, *, level, base_bdevs, strip_size_kb=0, uuid=None, superblock=False)"
    )]
    fn bdev_raid_create(
        &self,
        name: String,
        level: &str,
        base_bdevs: Vec<String>,
        strip_size_kb: Number,
        uuid: Option<&str>,
        superblock: bool,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (level, strip_kb, uuid) = (level_of(level)?, strip_size_kb.u32("strip_size_kb")?, parse_uuid(uuid)?);
        let (number, token) = (draft.number(), draft.commit());
        core.raids.create(Spec { name, level, strip_kb, bases: base_bdevs, uuid, superblock }, token.done());
        Ok(number)
    }

    #[pyo3(signature = (name, *, clear_superblock=false))]
    fn bdev_raid_delete(&self, name: &str, clear_superblock: bool) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        core.raids.delete(name, clear_superblock, token.done());
        Ok(number)
    }

    fn bdev_raid_add_base(&self, name: &str, base_bdev: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        core.raids.add_base(name, base_bdev, token.done());
        Ok(number)
    }

    fn bdev_raid_remove_base(&self, base_bdev: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        core.raids.remove_base(base_bdev, token.done());
        Ok(number)
    }

    fn bdev_raid_start(&self, name: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        core.raids.start(name, token.done());
        Ok(number)
    }

    fn bdev_raid_examine(&self, bdev: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        core.raids.examine(bdev, Box::new(move |outcome| token.answer(outcome.map(|joined| Value::Integer(joined.into())))));
        Ok(number)
    }

    fn bdev_raid_info<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.running()?.raids.list().iter().map(|array| show(py, array)).collect()
    }

    #[pyo3(signature = (*, process_window_size_kb, process_max_bandwidth_mb_sec))]
    fn bdev_raid_set_options(&self, process_window_size_kb: Number, process_max_bandwidth_mb_sec: Number) -> PyResult<()> {
        let window_kb = process_window_size_kb.u32("process_window_size_kb")?;
        let bandwidth_mb = process_max_bandwidth_mb_sec.u32("process_max_bandwidth_mb_sec")?;
        Ok(self.running()?.raids.set_options(Options { window_kb, bandwidth_mb }).map_err(Failure::from)?)
    }

    /// Members that go from now on are not missed: everything goes.
    fn bdev_raid_shut_down(&self) -> PyResult<()> {
        self.core()?.raids.shut_down();
        Ok(())
    }

    #[staticmethod]
    fn raid_superblock_decode<'py>(py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyDict>> {
        let (header, bases) = raid_superblock::decode(data).map_err(refused)?;
        superblock_dict(py, header, bases)
    }

    #[staticmethod]
    fn raid_superblock_encode<'py>(py: Python<'py>, fields: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyBytes>> {
        let members: Vec<Bound<'py, PyDict>> = field(fields, "base_bdevs")?;
        let bases = members.iter().map(base_of).collect::<PyResult<Vec<Base>>>()?;
        let mut bytes = vec![0; LENGTH_MAX];
        let length = raid_superblock::encode(&header_of(fields)?, &bases, &mut bytes).map_err(refused)?;
        Ok(PyBytes::new(py, &bytes[..length]))
    }
}
