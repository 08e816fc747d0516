//! Credit: how many bytes either side may have under way. Two counters per direction, all modulo 2^32.
//!
//! ```text
//!   guest ──data──> host (ReceiveCredit)              host ──data──> guest (SendCredit)
//!     received  bytes that the guest sent               sent       bytes that we sent
//!     forwarded bytes that the host's reader has        forwarded  the guest's last word on what it read
//!     announced `forwarded` as the guest last heard     buf_alloc  the guest's last word on its buffer
//!     received - forwarded <= BUFFER, always            sent - forwarded <= buf_alloc, else nothing is sent
//! ```
//!
//! A guest that sends past the buffer breaks the protocol ([`Overrun`]). A guest that tells nonsense about
//! its own buffer gets no credit to send into, which hurts its own connection only.

/// Bytes per connection that the device takes in before the host's reader has read them: the memory that
/// one connection can cost.
pub(super) const BUFFER: u32 = 256 * 1024;

/// The guest sent more than it had credit for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

/// Credit that we give the guest.
#[derive(Debug, Default)]
pub(super) struct ReceiveCredit {
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl ReceiveCredit {
    /// Accounts for a data packet of the guest.
    pub(super) fn take(&mut self, len: u32) -> Result<(), Overrun> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > BUFFER - held {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// All but `held` of the bytes received are off our hands.
    pub(super) fn settle(&mut self, held: usize) {
        debug_assert!(held <= BUFFER as usize, "holds more than the buffer");
        self.forwarded = self.received.wrapping_sub(held as u32);
    }

    /// `(buf_alloc, fwd_cnt)` for a packet that is about to leave.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (BUFFER, self.forwarded)
    }

    /// There is news for the guest, and by what it knows less than half of the buffer is free.
    pub(super) fn update_due(&self) -> bool {
        let known_held = self.received.wrapping_sub(self.announced);
        self.announced != self.forwarded && known_held > BUFFER / 2
    }
}

/// Credit that the guest gives us.
#[derive(Debug, Default)]
pub(super) struct SendCredit {
    buf_alloc: u32,
    forwarded: u32,
    sent: u32,
}

impl SendCredit {
    /// Takes over what a packet of the guest says.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.forwarded = fwd_cnt;
    }

    /// Bytes that we may send now.
    pub(super) fn free(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.forwarded);
        self.buf_alloc.saturating_sub(under_way) as usize
    }

    /// Accounts for `len` bytes, no more than [`Self::free`].
    pub(super) fn spend(&mut self, len: usize) {
        debug_assert!(len <= self.free(), "sent past the guest's credit");
        self.sent = self.sent.wrapping_add(len as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_can_be_filled_but_not_passed() {
        let mut credit = ReceiveCredit::default();
        assert_eq!(credit.take(BUFFER), Ok(()));
        assert_eq!(credit.take(1), Err(Overrun));
        credit.settle(BUFFER as usize - 1);
        assert_eq!(credit.take(2), Err(Overrun));
        assert_eq!(credit.take(1), Ok(()));
        assert_eq!(credit.take(u32::MAX), Err(Overrun));
    }

    #[test]
    fn an_update_is_due_when_the_guest_thinks_less_than_half_is_free_and_that_is_old() {
        let mut credit = ReceiveCredit::default();
        credit.take(BUFFER / 2).unwrap();
        credit.settle(0);
        assert!(!credit.update_due(), "half is still free as the guest sees it");
        credit.take(1).unwrap();
        assert!(credit.update_due());
        assert_eq!(credit.announce(), (BUFFER, BUFFER / 2));
        assert!(!credit.update_due());
    }

    #[test]
    fn no_update_is_due_without_news() {
        let mut credit = ReceiveCredit::default();
        credit.take(BUFFER).unwrap();
        assert!(!credit.update_due());
        credit.settle(BUFFER as usize - 1);
        assert!(credit.update_due());
    }

    #[test]
    fn counters_wrap() {
        let mut receive = ReceiveCredit::default();
        let mut send = SendCredit::default();
        let mut total = 0_u32;
        for _ in 0..(1 << 15) {
            receive.take(BUFFER - 1).unwrap();
            receive.settle(0);
            send.update(BUFFER, total);
            send.spend(BUFFER as usize - 1);
            total = total.wrapping_add(BUFFER - 1);
        }
        assert_eq!(receive.announce(), (BUFFER, total));
        assert_eq!(send.free(), 1);
    }

    #[test]
    fn a_shrunk_or_lying_buffer_gives_no_credit() {
        let mut credit = SendCredit::default();
        credit.update(100, 0);
        credit.spend(60);
        assert_eq!(credit.free(), 40);
        credit.update(50, 0);
        assert_eq!(credit.free(), 0);
        credit.update(100, 61);
        assert_eq!(credit.free(), 0, "read more than was sent");
        credit.update(100, 60);
        assert_eq!(credit.free(), 100);
    }
}
