//! Limits that the guest's control groups cannot express, refused by name.

use libcontainer::oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxResources};

use super::{Error, Result};

const NO_HOST_DEVICE: &str = "the host's block devices do not exist in the VM; limit QEMU on the host";
const NO_HOST_NETWORK: &str = "the host's network does not exist in the VM";

fn refused<T>(what: impl Into<String>, why: &'static str) -> Result<T> {
    Err(Error::Refused { what: what.into(), why })
}

/// Refuses what cannot hold.
pub fn check(resources: &LinuxResources, cpus: usize) -> Result<()> {
    resources.block_io().iter().try_for_each(block_io)?;
    resources.cpu().iter().try_for_each(|cpu| cpu_set(cpu, cpus))?;
    if let Some(network) = resources.network()
        && (network.class_id().is_some() || network.priorities().is_some())
    {
        return refused("linux.resources.network", NO_HOST_NETWORK);
    }
    if resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty()) {
        return refused("linux.resources.rdma", "the VM has no RDMA device");
    }
    Ok(())
}

fn block_io(limits: &LinuxBlockIo) -> Result<()> {
    let throttles = [
        limits.throttle_read_bps_device(),
        limits.throttle_write_bps_device(),
        limits.throttle_read_iops_device(),
        limits.throttle_write_iops_device(),
    ];
    let throttled = throttles.iter().any(|list| list.as_ref().is_some_and(|list| !list.is_empty()));
    let weighted = limits.weight_device().as_ref().is_some_and(|list| !list.is_empty());
    if throttled || weighted || limits.weight().is_some() || limits.leaf_weight().is_some() {
        return refused("linux.resources.blockIO", NO_HOST_DEVICE);
    }
    Ok(())
}

fn cpu_set(cpu: &LinuxCpu, cpus: usize) -> Result<()> {
    if let Some(set) = cpu.cpus()
        && !set.is_empty()
        && highest(set).is_none_or(|highest| highest >= cpus)
    {
        let what = format!("linux.resources.cpu.cpus {set:?}");
        return refused(
            what,
            "the VM has fewer CPUs, numbered from 0; annotation io.vmctr.vcpus sets how many",
        );
    }
    if let Some(nodes) = cpu.mems()
        && !nodes.is_empty()
        && highest(nodes) != Some(0)
    {
        return refused(format!("linux.resources.cpu.mems {nodes:?}"), "the VM has memory node 0 only");
    }
    Ok(())
}

/// The highest number of a list such as `0-2,5`.
fn highest(list: &str) -> Option<usize> {
    let ends = list.trim().split(',').map(|range| {
        let (start, end) = range.split_once('-').unwrap_or((range, range));
        let (start, end): (usize, usize) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
        (start <= end).then_some(end)
    });
    ends.collect::<Option<Vec<_>>>()?.into_iter().max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn verdict(value: serde_json::Value) -> std::result::Result<(), String> {
        let resources: LinuxResources = serde_json::from_value(value).unwrap();
        check(&resources, 2).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_of_cpus_are_understood() {
        for (list, expected) in
            [("0", Some(0)), ("0-3", Some(3)), ("5,0-2", Some(5)), ("3-1", None), ("a", None), ("", None)]
        {
            assert_eq!(highest(list), expected, "{list:?}");
        }
    }

    #[test]
    fn limits_of_the_hosts_devices_are_refused_by_name() {
        let throttle =
            json!({ "blockIO": { "throttleReadBpsDevice": [{ "major": 8, "minor": 0, "rate": 1 }] } });
        assert!(verdict(throttle).unwrap_err().contains("blockIO"));
        assert!(verdict(json!({ "network": { "classID": 1 } })).unwrap_err().contains("network"));
        assert!(verdict(json!({ "cpu": { "cpus": "0-2" } })).unwrap_err().contains("io.vmctr.vcpus"));
        assert!(verdict(json!({ "cpu": { "mems": "1" } })).unwrap_err().contains("node 0"));
    }

    #[test]
    fn ordinary_limits_pass() {
        verdict(json!({
            "devices": [{ "allow": false, "access": "rwm" }],
            "memory": { "limit": 1048576 }, "pids": { "limit": 10 },
            "cpu": { "shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1", "mems": "0" },
            "unified": { "memory.high": "1000000" }
        }))
        .unwrap();
    }
}
