//! vsock ports between host and guest. Guest ports are dialled by the host only; the guest may dial
//! nothing but [`READY`].

/// Guest port of the gRPC service in `agent.proto`.
pub const AGENT: u32 = 1024;

/// Guest port of stdio streams: 8 bytes of stream number, little-endian, then raw bytes.
pub const STDIO: u32 = 1025;

/// Host port that the agent connects to, once, when it serves [`AGENT`] and [`STDIO`].
pub const READY: u32 = 1026;

/// Guest port of exports' streams: each begins with the export's hello, which names the export.
pub const EXPORT: u32 = 1027;
