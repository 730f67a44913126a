//! A front end for tests that say what happens step by step, on simulated disks.
#![allow(dead_code)]

pub mod desk;
