package storehouse

// level is the newest level of commands that this program knows; the log takes
// commands of it once every server does. A command of a level says so in a field
// that older programs do not know.
//
//	1  the beginning
//	2  MembersCommand.level; PathsCommand.sign, and with it keys that retire: an older
//	   program would forget when, if it sealed the keys anew
//	3  UpstreamsCommand; PathsCommand.build
//	4  MembersCommand.seen
//	5  ProfilesCommand, ChannelsCommand
//	6  ProfilesCommand.rename, retention, tag, prune, assign, schedule, run; NewGeneration.automatic;
//	   MembersCommand.level: for whom machines speak that join
//	7  QueueCommand; ChannelsCommand.track, fetched, keep;
//	   AddPaths.lease, NoteBuild.lease
//	8  ChannelsCommand.expire
const level = 8

// Levels of commands and changes.
const (
	membersLevel = 6 // of the newest MembersCommand; see membersLevels
	retireLevel  = 2 // of keys that retire
	buildsLevel  = 3 // of commands about builds
	seenLevel    = 4 // of when machines were seen
	// schedulesLevel is that of upgrades by themselves.
	schedulesLevel = 6
)

// membersLevels are those at which a MembersCommand applies otherwise, newest first.
var membersLevels = []uint32{membersLevel, 2, 0}
