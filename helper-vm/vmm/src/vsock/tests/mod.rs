//! Tests of several parts together.
//!
//! | file | what it drives |
//! |---|---|
//! | [`peer`] | a well-behaved guest and the users of its connections, at the table's edge |
//! | [`peers`] | property tests: both do anything in any order, bytes and ends come out right |
//! | [`table`] | the table with packets made by hand |
//! | [`closes`] | opening, credit and ending, one case each |
//! | [`hostile`] | a guest that breaks the protocol, at the table's edge |
//! | [`driver`] | a guest's driver: rings in memory |
//! | [`queues`] | the engine on good and broken rings |
//! | [`life`] | the handle's life with and without QEMU; the per-VM socket |

mod closes;
mod driver;
mod hostile;
mod life;
mod peer;
mod peers;
mod queues;
mod table;
