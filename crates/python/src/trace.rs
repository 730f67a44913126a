//! Trace points: which are on, and what they told.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use qpair_bdev::trace::{self, ALL_POINTS, PAGE_MAX, Page, RECORD_BYTES};

use crate::engine::Engine;
use crate::values::{Number, Value};

#[pymethods]
impl Engine {
    fn trace_set(&self, points: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let points = points.within("points", 0..=u64::from(ALL_POINTS))? as u8;
        let (number, token) = (draft.number(), draft.commit());
        trace::set(&core.registry, points, token.done());
        Ok(number)
    }

    fn trace_read(&self, cursor: Vec<Number>, max_records: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let cursor = cursor.into_iter().map(|number| number.u64("cursor")).collect::<Result<Vec<u64>, _>>()?;
        let most = max_records.within("max_records", 0..=PAGE_MAX as u64)? as usize;
        let (number, token) = (draft.number(), draft.commit());
        trace::read(&core.registry, &cursor, most, Box::new(move |outcome| token.answer(outcome.map(Value::Trace))));
        Ok(number)
    }
}

pub fn page_dict<'py>(py: Python<'py>, page: &Page) -> PyResult<Bound<'py, PyDict>> {
    let mut bytes = Vec::with_capacity(page.records.len() * RECORD_BYTES);
    page.records.iter().for_each(|record| bytes.extend_from_slice(&record.encode()));
    let names = PyDict::new(py);
    for (number, name) in &page.names {
        names.set_item(number, name)?;
    }
    let dict = PyDict::new(py);
    dict.set_item("lcore", page.reactor.0)?;
    dict.set_item("records", PyBytes::new(py, &bytes))?;
    dict.set_item("next", page.next)?;
    dict.set_item("lost", page.lost)?;
    dict.set_item("names", names)?;
    Ok(dict)
}
