//! The guest's figures in the form that containerd's clients decode: cgroup v2 metrics.

use containerd_shim::protos::cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{Message, MessageField};
use vmctr_proto::agent::StatsReply;

/// Name by which containerd finds the decoder: the message's own, without a host.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The reply of the agent as containerd wants it.
pub fn metrics(stats: &StatsReply) -> Result<Any, containerd_shim::protos::protobuf::Error> {
    let metrics = Metrics {
        pids: MessageField::some(pids(stats)),
        cpu: MessageField::some(cpu(stats)),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(MemoryEvents {
            oom_kill: stats.memory_oom_kills,
            ..MemoryEvents::default()
        }),
        ..Metrics::default()
    };
    Ok(Any { type_url: TYPE_URL.to_owned(), value: metrics.write_to_bytes()?, ..Any::default() })
}

fn pids(stats: &StatsReply) -> PidsStat {
    // containerd's own shim reports no limit as 0.
    let limit = if stats.pids_limit == u64::MAX { 0 } else { stats.pids_limit };
    PidsStat { current: stats.pids_current, limit, ..PidsStat::default() }
}

fn cpu(stats: &StatsReply) -> CPUStat {
    CPUStat {
        usage_usec: stats.cpu_usage_usec,
        user_usec: stats.cpu_user_usec,
        system_usec: stats.cpu_system_usec,
        nr_periods: stats.cpu_periods,
        nr_throttled: stats.cpu_throttled_periods,
        throttled_usec: stats.cpu_throttled_usec,
        ..CPUStat::default()
    }
}

fn memory(stats: &StatsReply) -> MemoryStat {
    MemoryStat {
        usage: stats.memory_usage,
        usage_limit: stats.memory_limit,
        anon: stats.memory_anon,
        file: stats.memory_file,
        kernel_stack: stats.memory_kernel_stack,
        slab: stats.memory_slab,
        inactive_file: stats.memory_inactive_file,
        pgfault: stats.memory_pgfault,
        pgmajfault: stats.memory_pgmajfault,
        ..MemoryStat::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_arrive_under_their_names() {
        let stats = StatsReply {
            cpu_usage_usec: 1,
            memory_usage: 2,
            memory_limit: u64::MAX,
            memory_oom_kills: 3,
            pids_current: 4,
            pids_limit: u64::MAX,
            ..StatsReply::default()
        };
        let any = metrics(&stats).unwrap();
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage), (1, 2));
        assert_eq!((metrics.memory.usage_limit, metrics.memory_events.oom_kill), (u64::MAX, 3));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (4, 0));
    }
}
