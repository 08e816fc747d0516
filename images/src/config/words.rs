//! A Dockerfile instruction's words: quotes, escapes and variables.
//!
//! `'…'` is literal; in `"…"` and outside, `$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+other}`
//! are replaced from the image's environment and a backslash makes the next character literal.

/// Why words cannot be told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// A quote without its counterpart.
    #[error("A quotation mark is not closed")]
    Quote,
    /// `${` without `}`, or with a form that is not known.
    #[error("A variable in braces is malformed; use ${{NAME}}, ${{NAME:-default}} or ${{NAME:+other}}")]
    Variable,
}

/// The words of `text`; `lookup` tells a variable's value.
pub(super) fn split(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Vec<String>, WordError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = text.chars().peekable();
    let mut quote = None;
    while let Some(character) = rest.next() {
        match (character, quote) {
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            ('\'', None) | ('"', None) => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (c, Some(open)) if c == open => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(rest.next()),
            ('$', None | Some('"')) => word.get_or_insert_default().push_str(&variable(&mut rest, lookup)?),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    if quote.is_some() { Err(WordError::Quote) } else { Ok(words) }
}

type Rest<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn variable(rest: &mut Rest<'_>, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, WordError> {
    if rest.next_if_eq(&'{').is_none() {
        let mut name = String::new();
        while let Some(c) = rest.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
            name.push(c);
        }
        return Ok(if name.is_empty() { "$".into() } else { lookup(&name).unwrap_or_default() });
    }
    let mut inner = String::new();
    loop {
        match rest.next() {
            Some('}') => break,
            Some(c) => inner.push(c),
            None => return Err(WordError::Variable),
        }
    }
    braced(&inner, lookup)
}

fn braced(inner: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, WordError> {
    let (name, form) = inner.split_once(':').map_or((inner, None), |(name, form)| (name, Some(form)));
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(WordError::Variable);
    }
    let value = lookup(name).filter(|value| !value.is_empty());
    match form.map(|form| form.split_at_checked(1)) {
        None => Ok(value.unwrap_or_default()),
        Some(Some(("-", default))) => Ok(value.unwrap_or_else(|| default.to_owned())),
        Some(Some(("+", other))) => Ok(value.map_or_else(String::new, |_| other.to_owned())),
        Some(_) => Err(WordError::Variable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<Vec<String>, WordError> {
        split(text, &|name| (name == "HOME").then(|| "/root".to_owned()))
    }

    #[test]
    fn quotes_escapes_and_variables() {
        for (text, expected) in [
            ("a  b\tc", vec!["a", "b", "c"]),
            ("k=\"v w\" x='$HOME' ''", vec!["k=v w", "x=$HOME", ""]),
            ("$HOME/x ${HOME}y \"$HOME\" $none", vec!["/root/x", "/rooty", "/root", ""]),
            ("${none:-d} ${HOME:+o} ${HOME:-d} ${none:+o}", vec!["d", "o", "/root", ""]),
            ("a\\ b \\$HOME 5$", vec!["a b", "$HOME", "5$"]),
            ("", vec![]),
        ] {
            assert_eq!(words(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_left_open_is_refused() {
        assert_eq!(words("'a"), Err(WordError::Quote));
        assert_eq!(words("${a"), Err(WordError::Variable));
        assert_eq!(words("${a:?x}"), Err(WordError::Variable));
        assert_eq!(words("${}"), Err(WordError::Variable));
    }
}
