#!/usr/bin/perl
# Small network questions that the launcher asks; exit status 0 means yes.
#
#   net.pl ports N             N free ports, one on each line
#   net.pl amqp PORT           does an AMQP server greet?
#   net.pl kafka PORT          does a Kafka broker list itself as alive?
#   net.pl http PORT PATH      does a GET (as guest) answer 200?
#
# Uses only what Debian's perl-base has.
use strict;
use warnings;
use IO::Socket::INET;

my ($what, @arg) = @ARGV;
$SIG{ALRM} = sub { exit 1 };
$SIG{PIPE} = 'IGNORE';
alarm 5;

sub dial { IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $_[0], Timeout => 2) or exit 1 }

if ($what eq 'ports') {
    # Not bind(0): that gives ports from the range of outgoing connections,
    # and while a node is down for a restart any client could be given its
    # port as a local one. So: below that range, held until all are chosen.
    my @held;
    while (@held < $arg[0]) {
        my $port = 20000 + int rand 12000;
        my $socket = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => $port, Listen => 1) or next;
        push @held, $socket;
    }
    print $_->sockport, "\n" for @held;
    exit 0;
}
if ($what eq 'amqp') {
    my $socket = dial($arg[0]);
    syswrite $socket, "AMQP\0\0\x09\x01";
    my $got = sysread $socket, my $frame, 11;
    # connection.start is a method frame (1) on channel 0, class 10, method 10.
    exit($got && $got >= 11 && $frame =~ /^\x01\0\0....\0\x0a\0\x0a/s ? 0 : 1);
}
if ($what eq 'kafka') {
    # Metadata v1 for no topic. ApiVersions is answered before the controller
    # has let the broker in; only then does it stand in the list of brokers.
    my $socket = dial($arg[0]);
    my $body = pack 'n n N n/a* N', 3, 1, 7, 'launcher', 0;
    syswrite $socket, pack('N', length $body) . $body;
    my $answer = '';
    while (length $answer < 12) {
        sysread $socket, my $piece, 12 - length $answer or exit 1;
        $answer .= $piece;
    }
    my (undef, $correlation, $brokers) = unpack 'N N N', $answer;
    exit($correlation == 7 && $brokers > 0 ? 0 : 1);
}
if ($what eq 'http') {
    my $socket = dial($arg[0]);
    print $socket "GET $arg[1] HTTP/1.0\r\nHost: localhost\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n\r\n";
    $socket->flush;
    my $status = <$socket> // '';
    exit($status =~ m{^HTTP/1\.[01] 200} ? 0 : 1);
}
die "net.pl: unknown question: $what\n";
