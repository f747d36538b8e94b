#!/usr/bin/perl
# Parent of one broker node: starts the server (and its port mapper), reaps
# both, and ends when the server has ended. It exists for three reasons: a
# killed server must not stay behind as a zombie that still looks alive; the
# port mapper must not outlive the server, however that one died; and a node
# that belongs to another process (--parent-pid) must end with it.
#
#   keeper.pl DIR PARENT_PID|0 REMOVE EPMD_PORT|0 EPMD_COMMAND... :: SERVER_COMMAND...
#
# REMOVE is 1 when the folder goes too once that other process has ended.
#
# Uses only what Debian's perl-base has.
use strict;
use warnings;
use POSIX ();

my ($dir, $parent, $remove, $epmd_port, @rest) = @ARGV;
my (@epmd, @server);
while (@rest) {
    my $word = shift @rest;
    if ($word eq '::') { @server = @rest; last; }
    push @epmd, $word;
}
die "keeper.pl: no server command\n" unless @server;

# The caller may be a test whose output is a pipe: an inherited descriptor
# would keep that pipe open for as long as the node lives.
POSIX::close($_) for 3 .. 255;
POSIX::setsid();
chdir $dir or die "keeper.pl: $dir: $!\n";
$SIG{HUP} = $SIG{INT} = $SIG{PIPE} = 'IGNORE';

sub start_time {
    my ($pid) = @_;
    open my $stat, '<', "/proc/$pid/stat" or return '';
    my $line = <$stat> // '';
    $line =~ s/^.*\) //s;               # the name may hold blanks
    my @field = split / /, $line;
    return '' if ($field[0] // 'Z') eq 'Z';
    return $field[19] // '';
}

sub launch {
    my ($log, @command) = @_;
    my $pid = fork // die "keeper.pl: fork: $!\n";
    return $pid if $pid;
    POSIX::setsid();                    # a process group of its own
    open STDIN,  '<',  '/dev/null';
    open STDOUT, '>>', "$dir/$log";
    open STDERR, '>&', \*STDOUT;
    exec { $command[0] } @command or POSIX::_exit(127);
}

# Without this the pid of a dead parent could be given to another process.
my $parent_start = $parent ? start_time($parent) : '';
my $orphaned = sub { $parent && start_time($parent) ne $parent_start };
exit 0 if $parent && $parent_start eq '';

my $epmd = $epmd_port ? launch('epmd.log', @epmd) : 0;
if ($epmd_port) {
    # The server starts a mapper of its own, as a daemon that nobody owns,
    # when it finds none: so it is started only once ours answers.
    require IO::Socket::INET;
    for (1 .. 200) {
        last if IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $epmd_port, Timeout => 1);
        select undef, undef, undef, 0.02;
    }
}

my $stop = 0;
$SIG{TERM} = sub { $stop = 1 };
my $server = launch('server.log', @server);
open my $out, '>', "$dir/pid.new" or die "keeper.pl: $dir/pid: $!\n";
print $out "$server ", start_time($server), " $$ ", start_time($$), " $epmd\n";
close $out;
rename "$dir/pid.new", "$dir/pid";

while (waitpid($server, POSIX::WNOHANG()) == 0) {
    kill 'KILL', $server if $stop || $orphaned->();
    select undef, undef, undef, 0.05;
}
kill 'KILL', -$server;                  # helpers of the server, if any are left
if ($epmd) { kill 'KILL', $epmd; waitpid $epmd, 0; }

if ($remove && $orphaned->()) {
    chdir '/';
    system 'rm', '-rf', '--', $dir;
}
