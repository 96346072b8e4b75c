from visattn.train.__main__ import finish, main

finish(main())
