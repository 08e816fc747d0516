//! The two shapes of cgroup files that the agent reads.

/// The number of a "flat keyed" file, such as `cpu.stat`: one `key value` per line.
pub fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        if name == key { value.trim().parse().ok() } else { None }
    })
}

/// A single-value file: a number, or `max` for no limit.
pub fn single(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_whole_words() {
        let text = "oom 1\noom_kill 7\noom_group_kill 0\n";
        assert_eq!(keyed(text, "oom_kill"), Some(7));
        assert_eq!(keyed(text, "oom"), Some(1));
        assert_eq!(keyed(text, "kill"), None);
        assert_eq!(keyed("usage_usec x\n", "usage_usec"), None);
    }

    #[test]
    fn max_means_no_limit() {
        assert_eq!(single("max\n"), Some(u64::MAX));
        assert_eq!(single("4096\n"), Some(4096));
        assert_eq!(single("-1\n"), None);
    }
}
