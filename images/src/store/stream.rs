//! A gRPC stream of pieces as bytes.

use std::io::{self, Read};

use containerd_client::tonic::Streaming;
use tokio::runtime::Handle;

/// Reads what a stream brings; for a thread that may block, outside of the runtime's own.
pub struct StreamReader<M> {
    runtime: Handle,
    stream: Streaming<M>,
    data: fn(M) -> Vec<u8>,
    piece: Vec<u8>,
    read: usize,
}

impl<M> StreamReader<M> {
    /// Reads `stream`, of whose messages `data` takes the bytes. Call it within the runtime.
    pub fn new(stream: Streaming<M>, data: fn(M) -> Vec<u8>) -> Self {
        Self { runtime: Handle::current(), stream, data, piece: vec![], read: 0 }
    }
}

impl<M> Read for StreamReader<M> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.piece.len() {
            let next = self.runtime.block_on(self.stream.message());
            match next.map_err(|status| io::Error::other(status.message().to_owned()))? {
                Some(message) => (self.piece, self.read) = ((self.data)(message), 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.read);
        buffer[..count].copy_from_slice(&self.piece[self.read..self.read + count]);
        self.read += count;
        Ok(count)
    }
}
