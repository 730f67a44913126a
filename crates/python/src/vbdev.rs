//! Bdevs that stand on others.

use std::sync::Arc;

use pyo3::prelude::*;
use qpair_bdev::passthru::Passthru;

use crate::bdev::{parse_uuid, register};
use crate::engine::Engine;
use crate::values::Failure;

#[pymethods]
impl Engine {
    #[pyo3(signature = (name, base, *, uuid=None))]
    fn bdev_passthru_create(&self, name: &str, base: &str, uuid: Option<&str>) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let passthru = Passthru::new(&core.registry, name, base, parse_uuid(uuid)?).map_err(Failure::from)?;
        Ok(register(core, draft, Arc::new(passthru))?)
    }
}
