//! Sizes as an operator writes them: `400GiB`, `400GB`, `512 MiB`.

use super::ByteSize;

/// The text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// Number and unit are not told apart.
    #[error("a size is a whole number and a unit, such as \"400GiB\" or \"400GB\"")]
    Form,
    /// Of another unit.
    #[error("{0:?} is not one of the units B, KB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB")]
    Unit(String),
    /// More than any.
    #[error("it is more than 2^64 bytes")]
    TooLarge,
}

/// Units are required: `400` could mean anything.
///
/// # Errors
///
/// What is wrong with `text`.
pub fn parse(text: &str) -> Result<ByteSize, SizeError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or(SizeError::Form)?;
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::Form);
    }
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
    let unit = match unit.trim() {
        "B" => 1,
        "KB" | "kB" => 1000,
        "MB" => 1000_u64.pow(2),
        "GB" => 1000_u64.pow(3),
        "TB" => 1000_u64.pow(4),
        "PB" => 1000_u64.pow(5),
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "PiB" => 1 << 50,
        other => return Err(SizeError::Unit(other.to_owned())),
    };
    number.checked_mul(unit).map(ByteSize).ok_or(SizeError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_and_binary_units_differ() {
        assert_eq!(parse("400GB"), Ok(ByteSize(400_000_000_000)));
        assert_eq!(parse("400GiB"), Ok(ByteSize::gib(400)));
        assert_eq!(parse("0B"), Ok(ByteSize(0)));
        assert_eq!(parse("16 MiB"), Ok(ByteSize::mib(16)));
    }

    #[test]
    fn what_is_unclear_is_refused() {
        assert_eq!(parse("400"), Err(SizeError::Form));
        assert_eq!(parse("GiB"), Err(SizeError::Form));
        assert_eq!(parse("1.5GiB"), Err(SizeError::Unit(".5GiB".into())));
        assert_eq!(parse("1gb"), Err(SizeError::Unit("gb".into())));
        assert_eq!(parse("-1GB"), Err(SizeError::Form));
        assert_eq!(parse("16384PiB"), Err(SizeError::TooLarge));
        assert_eq!(parse("99999999999999999999B"), Err(SizeError::TooLarge));
    }
}
