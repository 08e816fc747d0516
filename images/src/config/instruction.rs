//! Dockerfile instructions that a commit may apply to the config: `-c 'CMD ["sh"]'`.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::words::{WordError, split};

/// Why a text is no instruction.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InstructionError {
    /// Not one of those that change a config.
    #[error(
        "{0:?} is no instruction for a commit; use CMD, ENTRYPOINT, ENV, USER, WORKDIR, LABEL, EXPOSE, \
         VOLUME or STOPSIGNAL"
    )]
    Unknown(String),
    /// Nothing follows the keyword, or too much.
    #[error("{0} takes {1}")]
    Arguments(&'static str, &'static str),
    /// Quotes or variables. Told whole: a command line's parser shows no sources.
    #[error("{0} cannot be read: {1}")]
    Words(&'static str, WordError),
}

/// A change to an image's config, with its text still to be expanded by the image's environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    keyword: &'static str,
    rest: String,
}

const KEYWORDS: [&str; 9] =
    ["CMD", "ENTRYPOINT", "ENV", "USER", "WORKDIR", "LABEL", "EXPOSE", "VOLUME", "STOPSIGNAL"];
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

impl FromStr for Instruction {
    type Err = InstructionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let keyword = KEYWORDS.into_iter().find(|keyword| keyword.eq_ignore_ascii_case(word));
        let keyword = keyword.ok_or_else(|| InstructionError::Unknown(word.chars().take(40).collect()))?;
        let instruction = Self { keyword, rest: rest.trim().to_owned() };
        // What is wrong shows now, not after the work of a commit, unless the image's environment decides.
        if !instruction.rest.contains('$') {
            instruction.apply(&mut Map::new())?;
        }
        Ok(instruction)
    }
}

/// Applies `instructions` to the `config` part of an image config.
pub(super) fn apply_all(
    instructions: &[Instruction],
    config: &mut Map<String, Value>,
) -> Result<(), InstructionError> {
    let sets = |keyword| instructions.iter().any(|instruction| instruction.keyword == keyword);
    // As in a Dockerfile: the former command was meant for the former entry point.
    if sets("ENTRYPOINT") && !sets("CMD") {
        config.remove("Cmd");
    }
    instructions.iter().try_for_each(|instruction| instruction.apply(config))
}

impl Instruction {
    fn apply(&self, config: &mut Map<String, Value>) -> Result<(), InstructionError> {
        match self.keyword {
            "CMD" => set(config, "Cmd", self.command()),
            "ENTRYPOINT" => set(config, "Entrypoint", self.command()),
            "ENV" => self.env(config)?,
            "LABEL" => self.label(config)?,
            "USER" => {
                set(config, "User", self.one(config, "one user, with a group after a colon if wanted")?)
            }
            "WORKDIR" => self.workdir(config)?,
            "STOPSIGNAL" => set(config, "StopSignal", self.signal(config)?),
            "EXPOSE" => self.expose(config)?,
            _ => self.volume(config)?,
        }
        Ok(())
    }

    /// Exec form if it is a JSON array of strings, else the shell's; without anything there is no command.
    fn command(&self) -> Value {
        if self.rest.is_empty() {
            return json!([]);
        }
        match serde_json::from_str::<Vec<String>>(&self.rest) {
            Ok(words) => json!(words),
            Err(_) => json!([SHELL[0], SHELL[1], self.rest]),
        }
    }

    fn words(&self, config: &Map<String, Value>) -> Result<Vec<String>, InstructionError> {
        let env = environment(config);
        split(&self.rest, &|name| env.get(name).cloned())
            .map_err(|error| InstructionError::Words(self.keyword, error))
    }

    fn one(&self, config: &Map<String, Value>, takes: &'static str) -> Result<Value, InstructionError> {
        match <[String; 1]>::try_from(self.words(config)?) {
            Ok([word]) => Ok(json!(word)),
            Err(_) => Err(InstructionError::Arguments(self.keyword, takes)),
        }
    }

    fn signal(&self, config: &Map<String, Value>) -> Result<Value, InstructionError> {
        const TAKES: &str = "one signal: a number from 1 to 64, or a name such as SIGTERM or RTMIN+3";
        let signal = self.one(config, TAKES)?;
        let known = signal.as_str().is_some_and(is_signal);
        known.then_some(signal).ok_or(InstructionError::Arguments(self.keyword, TAKES))
    }

    /// `KEY=VALUE …`, or the older `KEY the whole rest`.
    fn pairs(&self, config: &Map<String, Value>) -> Result<Vec<(String, String)>, InstructionError> {
        let wrong = || InstructionError::Arguments(self.keyword, "KEY=VALUE pairs");
        let words = self.words(config)?;
        let (first, rest) = words.split_first().ok_or_else(wrong)?;
        if !first.contains('=') {
            return match rest {
                [] => Err(wrong()),
                rest => Ok(vec![(first.clone(), rest.join(" "))]),
            };
        }
        let pair =
            |word: &String| word.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        let pairs: Option<Vec<_>> = words.iter().map(pair).collect();
        pairs.filter(|pairs| pairs.iter().all(|(key, _)| !key.is_empty())).ok_or_else(wrong)
    }

    fn env(&self, config: &mut Map<String, Value>) -> Result<(), InstructionError> {
        let pairs = self.pairs(config)?;
        let mut env: Vec<String> = strings(config.get("Env")).collect();
        for (key, value) in pairs {
            let entry = format!("{key}={value}");
            match env.iter_mut().find(|old| old.split_once('=').is_some_and(|(old, _)| old == key)) {
                Some(old) => *old = entry,
                None => env.push(entry),
            }
        }
        set(config, "Env", json!(env));
        Ok(())
    }

    fn label(&self, config: &mut Map<String, Value>) -> Result<(), InstructionError> {
        let pairs = self.pairs(config)?;
        extend(config, "Labels", pairs.into_iter().map(|(key, value)| (key, json!(value))));
        Ok(())
    }

    fn workdir(&self, config: &mut Map<String, Value>) -> Result<(), InstructionError> {
        let Value::String(path) = self.one(config, "one path")? else { return Ok(()) };
        let before = config.get("WorkingDir").and_then(Value::as_str).filter(|path| !path.is_empty());
        let path = match path.starts_with('/') {
            true => path,
            false => format!("{}/{path}", before.unwrap_or("/").trim_end_matches('/')),
        };
        set(config, "WorkingDir", json!(path));
        Ok(())
    }

    fn expose(&self, config: &mut Map<String, Value>) -> Result<(), InstructionError> {
        let wrong = || {
            InstructionError::Arguments("EXPOSE", "ports from 1 to 65535, with /tcp, /udp or /sctp if wanted")
        };
        let ports = self.words(config)?;
        let ports = ports.iter().map(|word| port(word)).collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
        if ports.is_empty() {
            return Err(wrong());
        }
        extend(config, "ExposedPorts", ports.into_iter().map(|port| (port, json!({}))));
        Ok(())
    }

    fn volume(&self, config: &mut Map<String, Value>) -> Result<(), InstructionError> {
        let paths = match serde_json::from_str::<Vec<String>>(&self.rest) {
            Ok(paths) => paths,
            Err(_) => self.words(config)?,
        };
        if paths.is_empty() || paths.iter().any(|path| path.is_empty()) {
            return Err(InstructionError::Arguments("VOLUME", "one or more paths"));
        }
        extend(config, "Volumes", paths.into_iter().map(|path| (path, json!({}))));
        Ok(())
    }
}

/// All but the real-time ones.
const SIGNALS: [&str; 34] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
];

/// Whether runtimes know it.
fn is_signal(word: &str) -> bool {
    if let Ok(number) = word.parse::<u8>() {
        return (1..=64).contains(&number);
    }
    let word = word.to_ascii_uppercase();
    let name = word.strip_prefix("SIG").unwrap_or(&word);
    let beyond = name.strip_prefix("RTMIN+").or_else(|| name.strip_prefix("RTMAX-"));
    let real_time = beyond.is_some_and(|number| number.parse::<u8>().is_ok_and(|number| number <= 30));
    real_time || ["RTMIN", "RTMAX"].contains(&name) || SIGNALS.contains(&name)
}

fn port(word: &str) -> Option<String> {
    let (number, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let number = number.parse::<u16>().ok().filter(|number| *number > 0)?;
    ["tcp", "udp", "sctp"].contains(&protocol).then(|| format!("{number}/{protocol}"))
}

fn set(config: &mut Map<String, Value>, key: &str, value: Value) {
    config.insert(key.to_owned(), value);
}

/// Adds to the object under `key`; what else may be there is replaced.
fn extend(config: &mut Map<String, Value>, key: &str, entries: impl Iterator<Item = (String, Value)>) {
    let mut object = match config.remove(key) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    };
    object.extend(entries);
    config.insert(key.to_owned(), Value::Object(object));
}

fn strings(value: Option<&Value>) -> impl Iterator<Item = String> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(|item| item.as_str().map(str::to_owned))
}

fn environment(config: &Map<String, Value>) -> BTreeMap<String, String> {
    let pair = |entry: String| entry.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    strings(config.get("Env")).filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(texts: &[&str]) -> Value {
        let mut config = json!({"Cmd": ["old"], "Env": ["PATH=/bin", "A=1"], "WorkingDir": "/srv"});
        let instructions: Vec<Instruction> = texts.iter().map(|text| text.parse().unwrap()).collect();
        apply_all(&instructions, config.as_object_mut().unwrap()).unwrap();
        config
    }

    #[test]
    fn commands_in_both_forms() {
        assert_eq!(applied(&["CMD [\"a\", \"b c\"]"])["Cmd"], json!(["a", "b c"]));
        assert_eq!(applied(&["cmd echo $HOME"])["Cmd"], json!(["/bin/sh", "-c", "echo $HOME"]));
        let with_entry = applied(&["ENTRYPOINT [\"e\"]"]);
        assert_eq!((&with_entry["Entrypoint"], with_entry.get("Cmd")), (&json!(["e"]), None));
        assert_eq!(applied(&["ENTRYPOINT [\"e\"]", "CMD [\"c\"]"])["Cmd"], json!(["c"]));
        assert_eq!(applied(&["CMD"])["Cmd"], json!([]));
    }

    #[test]
    fn environment_replaces_and_sees_what_is_there() {
        let env = applied(&["ENV A=2 B=\"x y\"", "ENV PATH=$PATH:/opt", "ENV OLD the rest"]);
        assert_eq!(
            env["Env"],
            json!(["PATH=/bin:/opt", "A=2", "B=x y", "OLD the rest".replacen(' ', "=", 1)])
        );
        let later = applied(&["ENV PORT=80 STOP=SIGQUIT", "EXPOSE $PORT", "STOPSIGNAL $STOP"]);
        assert_eq!(later["ExposedPorts"], json!({"80/tcp": {}}));
        assert_eq!(later["StopSignal"], "SIGQUIT");
    }

    #[test]
    fn the_others() {
        let config = applied(&[
            "USER 1:2",
            "WORKDIR app",
            "LABEL a=b c=\"d e\"",
            "EXPOSE 80 53/udp",
            "VOLUME [\"/v\"]",
            "VOLUME /w /x",
            "STOPSIGNAL SIGINT",
        ]);
        assert_eq!(config["User"], "1:2");
        assert_eq!(config["WorkingDir"], "/srv/app");
        assert_eq!(config["Labels"], json!({"a": "b", "c": "d e"}));
        assert_eq!(config["ExposedPorts"], json!({"80/tcp": {}, "53/udp": {}}));
        assert_eq!(config["Volumes"], json!({"/v": {}, "/w": {}, "/x": {}}));
        assert_eq!(config["StopSignal"], "SIGINT");
    }

    #[test]
    fn signals_have_numbers_and_names() {
        for text in ["9", "64", "SIGTERM", "winch", "Int", "SIGRTMIN+3", "RTMAX-14", "RTMIN"] {
            assert!(is_signal(text), "{text}");
        }
    }

    #[test]
    fn a_quote_that_is_not_closed_is_named() {
        let error = "ENV A=\"x".parse::<Instruction>().unwrap_err();
        assert!(error.to_string().contains("not closed"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_at_once() {
        for text in [
            "RUN x",
            "",
            "ENV",
            "ENV A",
            "ENV =x",
            "EXPOSE 0",
            "EXPOSE 80/x",
            "USER a b",
            "VOLUME",
            "LABEL 'x",
            "STOPSIGNAL",
            "STOPSIGNAL KILLL",
            "STOPSIGNAL 65",
            "STOPSIGNAL RTMIN+31",
        ] {
            assert!(text.parse::<Instruction>().is_err(), "{text}");
        }
    }
}
