//! The engine as Python sees it: `qpair._engine`. Its contract is the stub `src/qpair/_engine/__init__.pyi`.
//!
//! How it works. One file per room adds its methods to [`engine::Engine`]. A method checks what it was given, makes a
//! token, sends a message and returns; whoever ends the work answers the token from where it is ([`events`]).
//!
//! Rules. No reactor thread ever calls Python, holds a Python object or waits for the GIL: what Python gives is copied
//! before it leaves its thread. Whatever may wait lets go of the GIL. A forked child is refused by every method.
//!
//! Errors. [`values::EngineError`], an OSError with errno and a sentence; a `TypeError` for an argument of a wrong type.
//! A panic becomes pyo3's `PanicException` here, and poisons one poller over there.
//!
//! `unsafe` is used for buffers that Python and the engine look at together, and nowhere else.
//!
//! Limits. They stand beside what they limit; each refusal names its own.

// What pyo3 makes of a doc comment is the Python docstring; the contract's own docs are in the stub.
#![allow(missing_docs)]

mod bdev;
mod bounce;
mod core;
mod desk;
mod engine;
mod events;
mod held;
mod io;
mod measures;
mod perf;
mod pool;
mod pyfilter;
mod pyring;
mod pyworker;
mod raid;
mod trace;
mod values;
mod vbdev;
mod vbdev_modules;
mod vhost;
mod virtio;

use pyo3::prelude::*;

#[pymodule]
mod _engine {
    use super::*;

    #[pymodule_export]
    use super::desk::PythonBdevRequest;
    #[pymodule_export]
    use super::engine::Engine;
    #[pymodule_export]
    use super::events::{BdevEvent, LogEvent, PythonBdevWork, PythonWorkerDown, Reply, SessionEvent};
    #[pymodule_export]
    use super::measures::IoTimeout;
    #[pymodule_export]
    use super::pyfilter::PythonFilterRing;
    #[pymodule_export]
    use super::pyring::PythonBdevRing;
    #[pymodule_export]
    use super::pyworker::{PythonWorker, PythonWorkerLink};
    #[pymodule_export]
    use super::values::EngineError;
    #[pymodule_export]
    use super::vbdev_modules::{DelayControl, ErrorControl};
    #[pymodule_export]
    use super::virtio::{VirtioLink, VirtioMemory};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// `Event` is a union of classes, which only Python can make.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        let mut union = py.get_type::<Reply>().into_any();
        for class in [
            py.get_type::<BdevEvent>(),
            py.get_type::<IoTimeout>(),
            py.get_type::<SessionEvent>(),
            py.get_type::<LogEvent>(),
            py.get_type::<PythonBdevWork>(),
            py.get_type::<PythonWorkerDown>(),
        ] {
            union = union.bitor(class)?;
        }
        module.add("Event", union)
    }
}
