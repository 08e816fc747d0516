//! Reading a group's counters.

use std::fs;

use vmctr_proto::agent::StatsReply;

use super::{Cgroup, Error, Result, parse};

impl Cgroup {
    /// All counters that the protocol knows.
    pub fn stats(&self) -> Result<StatsReply> {
        let mut stats = StatsReply {
            memory_usage: self.single("memory.current")?,
            memory_limit: self.single("memory.max")?,
            memory_oom_kills: self.oom_kills()?,
            pids_current: self.single("pids.current")?,
            pids_limit: self.single("pids.max")?,
            ..StatsReply::default()
        };
        self.cpu(&mut stats)?;
        self.memory(&mut stats)?;
        Ok(stats)
    }

    fn cpu(&self, stats: &mut StatsReply) -> Result<()> {
        let text = self.read("cpu.stat")?;
        for (key, value) in [
            ("usage_usec", &mut stats.cpu_usage_usec),
            ("user_usec", &mut stats.cpu_user_usec),
            ("system_usec", &mut stats.cpu_system_usec),
            ("nr_periods", &mut stats.cpu_periods),
            ("nr_throttled", &mut stats.cpu_throttled_periods),
            ("throttled_usec", &mut stats.cpu_throttled_usec),
        ] {
            // A kernel without bandwidth control has no throttling lines: nothing was throttled.
            *value = parse::keyed(&text, key).unwrap_or(0);
        }
        Ok(())
    }

    fn memory(&self, stats: &mut StatsReply) -> Result<()> {
        let text = self.read("memory.stat")?;
        for (field, value) in [
            ("anon", &mut stats.memory_anon),
            ("file", &mut stats.memory_file),
            ("kernel_stack", &mut stats.memory_kernel_stack),
            ("slab", &mut stats.memory_slab),
            ("inactive_file", &mut stats.memory_inactive_file),
            ("pgfault", &mut stats.memory_pgfault),
            ("pgmajfault", &mut stats.memory_pgmajfault),
        ] {
            *value = parse::keyed(&text, field)
                .ok_or_else(|| Error::Field { path: self.dir.join("memory.stat"), field })?;
        }
        Ok(())
    }

    fn single(&self, file: &'static str) -> Result<u64> {
        let path = self.dir.join(file);
        let text = fs::read_to_string(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        parse::single(&text).ok_or(Error::Field { path, field: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_come_from_their_files() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.events", "low 0\noom_kill 2\n"),
            (
                "memory.stat",
                "anon 1\nfile 2\nkernel_stack 3\nslab 4\ninactive_file 5\npgfault 6\npgmajfault 7\n",
            ),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            ("cpu.stat", "usage_usec 30\nuser_usec 10\nsystem_usec 20\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let group = Cgroup { name: "c1".into(), dir: dir.path().to_owned() };
        let stats = group.stats().unwrap();
        assert_eq!((stats.cpu_usage_usec, stats.cpu_system_usec, stats.cpu_periods), (30, 20, 0));
        assert_eq!((stats.memory_usage, stats.memory_limit), (4096, u64::MAX));
        assert_eq!((stats.memory_slab, stats.memory_pgmajfault, stats.memory_oom_kills), (4, 7, 2));
        assert_eq!((stats.pids_current, stats.pids_limit), (3, 100));

        fs::write(dir.path().join("memory.stat"), "anon 1\n").unwrap();
        assert!(group.stats().unwrap_err().to_string().contains("\"file\""));
    }
}
